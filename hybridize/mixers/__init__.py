"""The mixers: sub-layers that move information between positions. `registry.MIXERS` lists them."""
