"""What calibrated recipes need: texts, what they do to the inputs of each linear, and the pass."""
