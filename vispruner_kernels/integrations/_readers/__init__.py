"""Readers: how to get features, scores and token positions from each family of models.

    llava.py  llava_next.py  llava_onevision.py  video_llava.py  qwen2_5_vl.py    one per family
    tower.py        run a CLIP or SigLIP tower
    tiles.py        images in tiles, for LLaVA-NeXT and LLaVA-OneVision
    arguments.py    read and check the arguments of the call

`read(model, inputs, method)` of a family runs the vision tower once for the images and once for the
videos of a call. `READERS` in `../_vision.py` maps classes of models to these functions.
"""
