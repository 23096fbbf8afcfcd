"""Questions that the paper and others ask of a run, one short script each; README.md lists results.

    tables     results as a table, of any runs or beside the paper's numbers
    gains      what runs gain over those of another method, paired by seed
    figures    accuracy against epochs or time (Fig. 3), bars of fields and of modalities
    cost       time and memory of each method's step (Tables 6 and S8)
    peers      speed beside torchvision, timm and scikit-learn
    pictures   a run's nearest neighbours, and where it places images on Earth
    retrieval  from image to metadata and back
    ask        month, hour, scale, country, place of an image
    missing    scores when fields are missing in the test images
    leakage    scores by distance to the nearest training image
    baselines  what needs no training: histograms, location alone, raw metadata
    few_labels kNN with few labels
    detect     object detection on xView from a ResNet-50 (Ayush et al., Table 3)
    segment    segmentation of SpaceNet or of one's own masks (Ayush et al., Table 4)
    export     the image encoder for timm
    variants   the demo data, changed: shuffled metadata, coarse or fine images, land cover as masks
    evidence   the runs of a study: prints what is missing, goes on where it stopped

common.py, results.py and transfer.py hold what several of them share; xview.py and masks.py read
what detect and segment need.
"""
