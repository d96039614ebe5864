"""k-NN and linear probes on given features."""
