"""What all adapters share: modifiers applied during training, and what they log."""
