"""The script of the page: shades the tokens anew when a layer or head is chosen; without it all heads are shown."""

from __future__ import annotations

SCRIPT = """
(() => {
  const box = document.getElementById("tokens"), data = document.getElementById("masks");
  if (!box || !data) return;
  const layers = JSON.parse(data.textContent), spans = box.children;
  const chosen = name => document.getElementById(name).value;
  const holds = (mask, token) => parseInt(mask[token >> 2], 16) >> (3 - token % 4) & 1;
  const shade = () => {
    const layer = chosen("layer"), head = chosen("head");
    const masks = layers.filter(row => layer === "all" || row.index === Number(layer))
      .flatMap(row => row.heads.filter((_, index) => head === "all" || index === Number(head)));
    for (let token = 0; token < spans.length; token++) {
      const count = masks.reduce((sum, mask) => sum + holds(mask, token), 0);
      spans[token].style.setProperty("--v", masks.length ? count / masks.length : 0);
      spans[token].title = `token ${token}: ${count} of ${masks.length} heads`;
    }
  };
  for (const name of ["layer", "head"]) document.getElementById(name).addEventListener("change", shade);
  shade();
})();
""".strip()
