"""The torch-free halves of the mixers."""
