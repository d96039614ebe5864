"""What tasks measure: accuracies, Fréchet distances, predictions under several masks. A metric knows no task."""
