"""Fine-tuning: rows of conversations, the loss and its gradients, and the adapter written."""
