"""The models and their objectives: start at gpt.py (blocks, initial weights) and objectives.py (the losses).

decoding.py and sampling.py sample images; augmentation.py and masks.py transform the model's inputs. The sizes are in
pipeline/config.py.
"""
