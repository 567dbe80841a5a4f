// The calculator of worth.md: shows one cell of the table in the page, and keeps the choice in the address.
(() => {
  const root = document.getElementById("calculator");
  const figures = JSON.parse(document.getElementById("calculator-figures").textContent);
  const form = root.querySelector("form");

  const count = (value) => value.toLocaleString("en");
  const size = (params) => (params >= 1e9 ? `${(params / 1e9).toPrecision(3)}B` : `${(params / 1e6).toPrecision(3)}M`);
  const short = (value) => (value >= 999.5 ? count(Math.round(value)) : value.toPrecision(3));
  const seconds = (value) => (value < 1 ? `${short(1000 * value)} ms` : `${short(value)} s`);
  const gigabytes = (value) => `${short(value)} GB`;

  const choices = {
    model: figures.models.map((model) => model.name),
    streams: figures.streams.map(String),
    kind: figures.kinds,
    batch: figures.batches.map(count),
    prompt: figures.prompts.map(count),
    device: figures.devices.map((device) => device.name),
  };
  const start = { model: 1, streams: 1, kind: 0, batch: 0, prompt: 0, device: 0 };

  // An address such as #model=2&batch=3 names options by their place.
  const named = new URLSearchParams(location.hash.slice(1));
  for (const [name, labels] of Object.entries(choices)) {
    const select = form.elements[name];
    labels.forEach((label, index) => select.add(new Option(label, index)));
    const wanted = Number(named.get(name) ?? start[name]);
    select.value = wanted in labels ? wanted : start[name];
  }

  function cell(at) {
    const axes = [figures.devices, figures.batches, figures.prompts];
    const places = [at.device, at.batch, at.prompt];
    const index = axes.reduce((sum, axis, depth) => sum * axis.length + places[depth], at.model);
    const rows = figures.cells[index];
    const kinds = figures.kinds.length;
    const first = 1 + (kinds + 1) * at.streams;
    return [rows[0], rows[first + at.kind], rows[first + kinds]];
  }

  function bar(colour, label, value, text, longest, limit) {
    const row = document.createElement("div");
    row.className = "bar";
    const [name, track, number] = ["label", "track", "value"].map((part) => {
      const element = document.createElement("span");
      element.className = part;
      row.append(element);
      return element;
    });
    name.textContent = label;
    const fill = document.createElement("div");
    fill.className = "fill";
    fill.style.cssText = `background: var(--${colour}); width: ${(100 * value) / longest}%`;
    track.append(fill);
    number.textContent = text;
    if (limit !== undefined && value > limit) {
      number.classList.add("too-much");
      number.title = "more than the device has";
    }
    if (limit !== undefined && limit < longest) {
      const line = document.createElement("div");
      line.className = "limit";
      line.title = "the device's memory";
      line.style.left = `${(100 * limit) / longest}%`;
      track.append(line);
    }
    return row;
  }

  function verdict(P, times, memories, limit, twin) {
    const fits = memories.map((memory) => memory <= limit);
    const ratio = (values) => (values[1] / values[2]).toPrecision(3);
    if (!fits[1]) {
      return `With P = ${P} it does not fit this device${fits[2] ? "; the larger model does" : ""}.`;
    }
    if (!fits[2]) {
      return `P = ${P} fits this device; the plain model of equal predicted loss (${twin}) does not.`;
    }
    const faster = times[1] <= times[2];
    const smaller = memories[1] <= memories[2];
    const both = faster === smaller;
    const answer = both ? (faster ? "By this count streams win" : "By this count the larger model wins") : faster ? "By this count streams are faster and the larger model is smaller" : "By this count streams are smaller and the larger model is faster";
    return `${answer}: P = ${P} takes ${ratio(times)} of the time and ${ratio(memories)} of the memory of the plain model of equal predicted loss (${twin}).`;
  }

  function show() {
    const at = Object.fromEntries(Object.keys(choices).map((name) => [name, Number(form.elements[name].value)]));
    const model = figures.models[at.model];
    const P = figures.streams[at.streams];
    const twin = size(model.twins[at.streams]);
    const limit = figures.devices[at.device].memory;
    const rows = cell(at);
    const times = rows.map(([, prefill, decode]) => prefill + decode);
    const memories = rows.map(([memory]) => memory);
    const labels = [`plain, ${size(model.params)}`, `P = ${P}`, `equal loss, ${twin}`];
    const colours = ["plain", "streams", "dense"];
    const draw = (place, values, format, most) => {
      const longest = Math.max(...values);
      const bars = values.map((value, i) => bar(colours[i], labels[i], value, format(value), longest, most));
      root.querySelector(place).replaceChildren(...bars);
    };
    draw(".time", times, seconds);
    draw(".memory", memories, gigabytes, limit);
    root.querySelector(".verdict").textContent = verdict(P, times, memories, limit, twin);
  }

  form.addEventListener("change", () => {
    history.replaceState(null, "", `#${new URLSearchParams(new FormData(form))}`);
    show();
  });
  show();
})();
