"use strict";
(async () => {
  const read = (id) => JSON.parse(document.getElementById(id).textContent);
  const one = (id) => document.getElementById(id);
  const scenes = read("scenes");
  for (const scene of scenes) {
    const bytes = Uint8Array.from(atob(scene.mass), (letter) => letter.charCodeAt(0));
    scene.stored = new Uint16Array(bytes.buffer);
  }
  const views = await Bokeh.embed.embed_item(read("item"));
  const plot = views.roots[0].model;
  const source = (name) => plot.renderers.map((each) => each.data_source).find((each) => each.name === name);
  const [masses, chosen, rings] = ["masses", "chosen", "sinks"].map(source);
  const image = masses.data.image[0];
  const width = plot.x_range.end - plot.x_range.start;
  const palette = plot.renderers[0].glyph.color_mapper.palette;
  const [low, high] = [plot.renderers[0].glyph.color_mapper.low, plot.renderers[0].glyph.color_mapper.high];

  // The mean over the chosen layers and heads: one row of masses a step, of the positions that exist.
  function rows(scene, layer, head) {
    const layers = layer < 0 ? scene.layers.map((_, index) => index) : [layer];
    const heads = head < 0 ? Array.from({ length: scene.heads }, (_, index) => index) : [head];
    return scene.keys.map((keys, step) => {
      const row = new Float64Array(keys);
      for (const l of layers) for (const h of heads) {
        const start = ((step * scene.layers.length + l) * scene.heads + h) * scene.positions;
        for (let key = 0; key < keys; key++) row[key] += scene.stored[start + key];
      }
      return row.map((sum) => (sum * scene.scale) / (layers.length * heads.length));
    });
  }

  function sinks(row) {
    const mean = row.reduce((sum, mass) => sum + mass, 0) / row.length;
    const variance = row.reduce((sum, mass) => sum + (mass - mean) ** 2, 0) / row.length;
    const border = mean + 2 * Math.sqrt(variance);
    return [...row.keys()].filter((key) => row[key] > border);
  }

  function color(mass) {
    const share = Math.log(Math.max(mass, low) / low) / Math.log(high / low);
    const place = Math.min(palette.length - 1, Math.floor(share * palette.length));
    const shade = palette[place];
    return [typeof shade === "number" ? `#${(shade >>> 8).toString(16).padStart(6, "0")}` : shade, place > 128 ? "#000000" : "#ffffff"];
  }

  function words(scene, step, row, marked) {
    return [...row].map((mass, position) => {
      const token = document.createElement("span");
      const said = scene.vocabulary[scene.tokens[step][position]];
      const masked = scene.masked[step][position] === "1";
      token.textContent = masked ? "▒" : said;
      token.title = `position ${position}: ${masked ? "mask" : said}, mass ${mass.toFixed(2)}`;
      token.className = [masked ? "mask" : "", marked.includes(position) ? "sink" : ""].join(" ").trim();
      [token.style.background, token.style.color] = color(mass);
      return token;
    });
  }

  const state = { rows: [] };
  function show() {
    const scene = scenes[Number(one("model").value)];
    const step = Number(one("step").value);
    const row = state.rows[step];
    const marked = sinks(row);
    chosen.data = { y: [step] };
    rings.data = { x: marked, y: marked.map(() => step) };
    one("said").textContent = scene.steps[step];
    one("step").setAttribute("aria-valuetext", scene.steps[step]);
    one("text").replaceChildren(...words(scene, step, row, marked));
    const named = marked.toSorted((a, b) => row[b] - row[a])
      .map((key) => `${key} ${scene.masked[step][key] === "1" ? "▒" : scene.vocabulary[scene.tokens[step][key]].trim()} (${row[key].toFixed(2)})`);
    one("found").textContent = `Sinks, largest first, position token (mass): ${named.join(", ") || "none"}`;
  }

  function draw() {
    const scene = scenes[Number(one("model").value)];
    state.rows = rows(scene, Number(one("layer").value), Number(one("head").value));
    image.fill(NaN);
    state.rows.forEach((row, step) => row.forEach((mass, key) => { image[step * width + key] = mass; }));
    masses.change.emit();
    show();
  }

  function options(id, names, all) {
    const made = names.map((name, index) => new Option(name, String(index)));
    one(id).replaceChildren(...(all ? [new Option(all, "-1")] : []), ...made);
  }

  function choose() {
    const scene = scenes[Number(one("model").value)];
    options("layer", scene.layers, scene.layers.length === scene.depth ? "mean over all" : "mean over these");
    options("head", Array.from({ length: scene.heads }, (_, index) => `head ${index}`), "mean over all");
    one("step").max = String(scene.steps.length - 1);
    draw();
  }

  options("model", scenes.map((scene) => scene.name));
  one("model").addEventListener("change", choose);
  for (const id of ["layer", "head"]) one(id).addEventListener("change", draw);
  one("step").addEventListener("input", show);
  choose();
  document.body.dataset.ready = "yes";
})();
