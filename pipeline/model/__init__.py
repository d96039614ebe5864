"""The models and what they learn: start at gpt.py (sizes, blocks, initial weights) and objectives.py (the losses).

decoding.py and sampling.py draw images; augmentation.py and masks.py change what the model reads.
"""
