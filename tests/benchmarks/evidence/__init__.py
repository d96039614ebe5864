"""`make evidence`: small models trained on CIFAR-10, and what they show about the findings of the paper."""
