"""The hybrid as a transformers model: classes, swap, conversion, loading and the self-contained export."""
