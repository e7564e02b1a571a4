"""Charts as SVG elements: they scale, keep their text legible on a phone, and follow light and dark."""
