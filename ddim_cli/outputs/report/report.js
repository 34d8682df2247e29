"use strict";
(() => {
  const $ = (id) => document.getElementById(id);
  const data = JSON.parse($("data").textContent);
  const isSweep = data.kind === "sweep";
  const GAP = 10, ALL = "";

  // ---- What there is -------------------------------------------------------------------------------------------

  /** A picture of a set, and what its sidecar says. Values are JSON texts: a large seed would not survive as a number. */
  class Picture {
    constructor(set, [number, source, group, row, label]) {
      Object.assign(this, { set, number, source, group, row, label, order: BigInt(number) });
    }
    get noun() { return this.set.noun; }
    get name() { return `${this.noun} ${this.number}`; }

    /** The text of one value, undefined where the record has none. */
    value(...path) {
      const group = this.set.groups[this.group];
      if (!group) return undefined;
      group.places ??= new Map(group.paths.map((own, at) => [JSON.stringify(own), at]));
      const at = group.places.get(JSON.stringify(path));
      return at === undefined ? undefined : this.text(group, at);
    }
    text(group, at) { return group.texts[at] ?? this.row[group.varying.indexOf(at)]; }

    /** The record as nested Maps whose leaves are texts; null where nothing is known. */
    record() {
      const group = this.set.groups[this.group];
      if (!group) return null;
      const root = new Map();
      group.paths.forEach((path, at) => {
        let inner = root;
        for (const key of path.slice(0, -1)) {
          if (!inner.has(key)) inner.set(key, new Map());
          inner = inner.get(key);
        }
        inner.set(path.at(-1), this.text(group, at));
      });
      return root;
    }
    get class() {
      const text = this.value("sampling", "class");
      return text === undefined || text === "null" ? undefined : text;
    }
    /** A text that it was made from; undefined where there is none. */
    sentence(key) {
      const text = this.value("sampling", key);
      return text?.startsWith('"') ? JSON.parse(text) : undefined;
    }
    get prompt() { return this.sentence("prompt"); }
    get negative() { return this.sentence("negative_prompt"); }

    /** What a search looks through, in lower case; made when it is first looked through. */
    get words() {
      this.found ??= [this.prompt, this.negative, this.value("sampling", "between_prompts", "prompts"), this.label, this.name].filter(Boolean).join("\n").toLowerCase();
      return this.found;
    }
    describe() {
      return [this.name, this.label, this.class && `class ${this.class}`, this.prompt, this.set.about].filter(Boolean).join(", ");
    }
  }

  const sets = data.sets.map((raw, index) => {
    const set = { ...raw, index };
    set.pictures = raw.pictures.map((one) => new Picture(set, one));
    set.byNumber = new Map(set.pictures.map((picture) => [picture.number, picture]));
    return set;
  });
  const byPlace = new Map(sets.map((set) => [String(set.at), set]));
  const classes = [...new Set(sets.flatMap((set) => set.pictures.map((p) => p.class)))].filter((c) => c !== undefined)
    .sort((a, b) => Number(a) - Number(b));
  const hasPrompts = sets.some((set) => set.pictures.some((picture) => picture.prompt !== undefined));
  const searches = hasPrompts || sets.some((set) => set.pictures.some((picture) => picture.label));
  const LABEL = hasPrompts ? 36 : 19;
  const scored = sets.filter((set) => set.score);
  const scores = scored.map((set) => set.score.value);
  const best = Math.min(...scores), worst = Math.max(...scores);

  /** The JSON text of a record, laid out as in the sidecar. */
  function layOut(tree, depth = 0) {
    if (!(tree instanceof Map)) return tree;
    const pad = "  ".repeat(depth + 1);
    const rows = [...tree].map(([key, value]) => `${pad}${JSON.stringify(key)}: ${layOut(value, depth + 1)}`);
    return `{\n${rows.join(",\n")}\n${"  ".repeat(depth)}}`;
  }

  /** A JSON text as a person reads it: strings without their quotes. */
  const plain = (text) => (text.startsWith('"') ? JSON.parse(text) : text);
  const count = (number) => number.toLocaleString("en");
  const counted = (number, noun) => `${count(number)} ${noun}${number === 1 ? "" : "s"}`;

  /** "0-63,100" as ranges; null for what is still being typed. Throws a sentence for what is no list. */
  function parseList(text) {
    if (/[-,]\s*$/.test(text)) return null;
    return text.split(",").map((part) => {
      const match = /^\s*(\d+)(?:-(\d+))?\s*$/.exec(part);
      if (!match) throw new Error(`“${part.trim()}” is neither a number nor a range of them such as 0-63`);
      const first = BigInt(match[1]), last = BigInt(match[2] ?? match[1]);
      if (last < first) throw new Error(`the range ${part.trim()} runs backwards; write ${last}-${first}`);
      return [first, last];
    });
  }

  // ---- Where the reader is: kept in the address, so that a reload comes back here ------------------------------------

  const views = isSweep ? [["side", "Side by side"], ["gallery", "Gallery"], ["table", "Table"]] : [["gallery", "Gallery"]];
  const EACH = 4;
  const start = () => ({
    view: views[0][0], at: data.axes.map(() => 0), set: 0, search: ALL, seeds: ALL, class: ALL, open: null,
    across: 0, down: data.axes.length > 1 ? 1 : -1, each: EACH,
  });
  let state = start();
  let ranges = null;
  const zoom = { gallery: null, side: null };

  const set = () => (isSweep ? byPlace.get(String(state.at)) : sets[state.set]);

  function readAddress() {
    const found = new URLSearchParams(location.hash.slice(1)), fresh = start();
    if (views.some(([name]) => name === found.get("view"))) fresh.view = found.get("view");
    const at = (found.get("at") ?? "").split(",").map(Number);
    if (at.length === fresh.at.length && at.every((i, axis) => Number.isInteger(i) && data.axes[axis].values[i] !== undefined)) fresh.at = at;
    const other = sets.findIndex((one) => one.name === found.get("set"));
    if (other > 0 && !isSweep) fresh.set = other;
    fresh.search = (searches && found.get("search")) || ALL;
    fresh.seeds = found.get("seeds") ?? ALL;
    if (classes.includes(found.get("class"))) fresh.class = found.get("class");
    fresh.open = found.get("seed");
    const each = Number(found.get("each"));
    if (each >= 1 && each <= 36) fresh.each = Math.round(each);
    for (const side of ["across", "down"]) {
      const axis = Number(found.get(side) ?? -1);
      if (data.axes.length > 1 && data.axes[axis]) fresh[side] = axis;
    }
    if (fresh.across === fresh.down) fresh.down = fresh.across ? 0 : 1;
    state = fresh;
    try { ranges = state.seeds ? parseList(state.seeds) : null; } catch { ranges = null; state.seeds = ALL; }
  }

  function writeAddress() {
    const usual = start(), told = new URLSearchParams();
    const say = (key, value, unless) => { if (String(value) !== String(unless)) told.set(key, value); };
    say("view", state.view, usual.view);
    say("at", state.at, usual.at);
    if (!isSweep && state.set) told.set("set", sets[state.set].name);
    say("search", state.search, ALL);
    say("seeds", state.seeds, ALL);
    say("class", state.class, ALL);
    say("across", state.across, usual.across);
    say("down", state.down, usual.down);
    say("each", state.each, usual.each);
    if (state.open !== null) told.set("seed", state.open);
    const hash = told.toString().replaceAll("%2C", ",");
    if (hash === location.hash.slice(1)) return;
    try { history.replaceState(null, "", hash ? `#${hash}` : location.pathname + location.search); } catch { /* a browser that forbids it for files */ }
  }

  /** Whether a picture has every word that is searched for. */
  const isFound = (picture, words) => words.every((word) => picture.words.includes(word));
  const wordsOf = (text) => text.toLowerCase().split(/\s+/).filter(Boolean);

  /** The pictures of a set that the filters leave, in order. */
  function shown(one) {
    if (!one) return [];
    const key = `${state.seeds}|${state.class}|${state.search}`;
    if (one.shownFor !== key) {
      const words = wordsOf(state.search);
      one.shown = one.pictures.filter((picture) => isFound(picture, words) &&
        (state.class === ALL || picture.class === state.class) &&
        (!ranges || ranges.some(([first, last]) => first <= picture.order && picture.order <= last)));
      one.shownFor = key;
    }
    return one.shown;
  }

  // ---- Building blocks -----------------------------------------------------------------------------------------------

  function el(tag, { text, on, style, ...attributes } = {}, ...children) {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (value === true) made.setAttribute(name, "");
      else if (value !== undefined && value !== null && value !== false) made.setAttribute(name, value);
    }
    if (text !== undefined) made.textContent = text;
    for (const [name, value] of Object.entries(style ?? {})) made.style.setProperty(name, value);
    for (const [name, listener] of Object.entries(on ?? {})) made.addEventListener(name, listener);
    made.append(...children.filter((child) => child !== null && child !== undefined));
    return made;
  }

  const sides = (one) => one?.size ?? sets.find((other) => other.size)?.size ?? [64, 64];

  /** The widths that a picture may be shown at: small ones at whole multiples, so that their pixels stay square. */
  function widths(one) {
    const [width, height] = sides(one);
    if (width <= 64) {
      const times = (size) => width * Math.max(1, Math.round(size / width));
      return { min: width * Math.ceil(32 / width), max: times(320), step: width, usual: times(96) };
    }
    if (width > 2 * height) return { min: 240, max: Math.max(width, 480), step: 20, usual: Math.min(width, 1100) };
    return { min: 48, max: 512, step: 16, usual: 160 };
  }
  const isCoarse = (one, width) => sides(one)[0] <= 128 && width >= sides(one)[0];
  const heightOf = (one, width) => { const [w, h] = sides(one); return Math.max(1, Math.round((width * h) / w)); };

  /** Put a picture into a tile: a button that opens it. */
  function fill(tile, picture, width, withLabel) {
    const [image, label, prompt] = tile.children;
    if (image.getAttribute("src") !== picture.source) {
      tile.classList.remove("broken");
      image.src = picture.source;
    }
    image.alt = picture.describe();
    image.width = width;
    image.height = heightOf(picture.set, width);
    tile.title = [picture.name, picture.label, picture.prompt].filter(Boolean).join(", ");
    if (withLabel) label.textContent = picture.number;
    if (prompt) prompt.textContent = picture.prompt ?? "";
  }

  function tile(withLabel, attributes = {}, withPrompt = false) {
    const image = el("img", { decoding: "async", draggable: "false" });
    const made = el("button", { type: "button", class: "tile", ...attributes }, image, withLabel ? el("span", { "aria-hidden": "true" }) : null,
      withPrompt ? el("span", { "aria-hidden": "true", class: "prompt" }) : null);
    image.addEventListener("error", () => made.classList.add("broken"));
    return made;
  }

  // ---- The gallery: as many tiles as fit on the screen, however many pictures there are --------------------------------

  const gallery = {
    list: $("gallery"), tiles: new Map(), current: 0, pictures: [],

    /** Where the tiles lie, for the room there is. */
    measure() {
      const room = this.list.clientWidth || 1;
      this.width = Math.min(zoom.gallery ?? widths(set()).usual, room);
      this.columns = Math.max(1, Math.floor((room + GAP) / (this.width + GAP)));
      this.height = heightOf(set(), this.width) + LABEL + GAP;
      this.rows = Math.ceil(this.pictures.length / this.columns);
      this.list.style.setProperty("height", `${Math.max(0, this.rows * this.height - GAP)}px`);
      this.list.classList.toggle("pixelated", isCoarse(set(), this.width));
    },

    show() {
      const before = this.pictures[this.current];
      this.pictures = shown(set());
      const kept = before ? this.pictures.findIndex((picture) => picture.number === before.number) : -1;
      this.current = Math.max(0, kept);
      this.measure();
      for (const [at, item] of this.tiles) {
        if (at < this.pictures.length) this.place(item, at);
      }
      this.render();
    },

    place(item, at) {
      const x = (at % this.columns) * (this.width + GAP), y = Math.floor(at / this.columns) * this.height;
      item.style.setProperty("transform", `translate(${x}px, ${y}px)`);
      item.setAttribute("aria-posinset", at + 1);
      item.setAttribute("aria-setsize", this.pictures.length);
      const button = item.firstChild;
      fill(button, this.pictures[at], this.width, true);
      button.style.setProperty("width", `${this.width}px`);
      button.tabIndex = at === this.current ? 0 : -1;
      button.dataset.at = at;
    },

    /** Have tiles for what is on the screen and a screen around it, and for the one that has the focus. */
    render() {
      const top = -this.list.getBoundingClientRect().top, screen = window.innerHeight;
      const first = Math.max(0, Math.floor((top - screen / 2) / this.height)) * this.columns;
      const end = Math.min(this.pictures.length, Math.max(0, Math.ceil((top + 1.5 * screen) / this.height)) * this.columns);
      const wanted = new Set();
      for (let at = first; at < end; at++) wanted.add(at);
      if (this.current < this.pictures.length) wanted.add(this.current);
      for (const [at, item] of this.tiles) {
        if (!wanted.has(at)) { item.remove(); this.tiles.delete(at); }
      }
      // In the order of the pictures, so that a screen reader meets them in it; those that stay are not moved.
      let next = this.list.firstElementChild;
      for (const at of [...wanted].sort((a, b) => a - b)) {
        let item = this.tiles.get(at);
        if (item) { next = item.nextElementSibling; continue; }
        item = el("li", {}, tile(true, {}, hasPrompts));
        this.tiles.set(at, item);
        this.place(item, at);
        this.list.insertBefore(item, next);
      }
    },

    focus(at) {
      if (!this.pictures.length) return;
      const before = this.tiles.get(this.current);
      this.current = Math.min(Math.max(at, 0), this.pictures.length - 1);
      if (before) before.firstChild.tabIndex = -1;
      this.render();
      const button = this.tiles.get(this.current).firstChild;
      button.tabIndex = 0;
      button.focus({ preventScroll: true });
      button.scrollIntoView({ block: "nearest" });
    },

    key(event) {
      const page = this.columns * Math.max(1, Math.floor(window.innerHeight / this.height) - 1);
      const moves = {
        ArrowLeft: -1, ArrowRight: 1, ArrowUp: -this.columns, ArrowDown: this.columns,
        PageUp: -page, PageDown: page, Home: -this.current, End: this.pictures.length,
      };
      const move = moves[event.key];
      if (move === undefined || event.ctrlKey || event.metaKey || event.altKey) return;
      event.preventDefault();
      // Up from the first row and down from the last row stay, as in any grid.
      if (event.key.startsWith("Arrow") && !this.pictures[this.current + move]) return;
      this.focus(this.current + move);
    },
  };
  gallery.list.addEventListener("click", (event) => {
    const button = event.target.closest(".tile");
    if (!button) return;
    gallery.current = Number(button.dataset.at);
    open(gallery.pictures[gallery.current]);
  });
  gallery.list.addEventListener("keydown", (event) => gallery.key(event));
  gallery.list.addEventListener("focusin", (event) => {
    const at = Number(event.target.dataset.at);
    if (at === gallery.current) return;
    const before = gallery.tiles.get(gallery.current);
    if (before) before.firstChild.tabIndex = -1;
    gallery.current = at;
    event.target.tabIndex = 0;
  });

  // ---- The cells of a sweep side by side ---------------------------------------------------------------------------------

  const valueOf = (axis, i) => data.axes[axis].values[i];
  const place = (changes) => state.at.map((i, axis) => changes[axis] ?? i);

  /** How good a score is among those there are: 0 the worst, 1 the best; distances spread over powers of ten. */
  function share(score) {
    if (best === worst) return 0;
    const spread = best > 0 ? Math.log : (x) => x;
    return (spread(worst) - spread(score.value)) / (spread(worst) - spread(best));
  }
  const sameCount = new Set(sets.map((one) => one.pictures.length)).size === 1;
  const isBest = (one) => scored.length > 1 && one.score && one.score.value === best;

  function cellSummary(one) {
    const images = one.planned && one.planned > one.pictures.length
      ? `${count(one.pictures.length)} of ${counted(one.planned, "image")}` : counted(one.pictures.length, "image");
    const head = one.score ? `${one.score.short} ${one.score.text}` : one.rate_text ?? images;
    const rest = [one.score && one.rate_text, !sameCount && head !== images && images].filter(Boolean).join(" · ");
    return { head, rest };
  }

  function goButton(one) {
    const { head, rest } = cellSummary(one);
    return el("button", {
      type: "button", class: one.score ? "go shaded" : "go", title: "Open this cell in the gallery",
      "aria-label": `${one.about}: ${head}${isBest(one) ? ", the best" : ""}${rest ? `, ${rest}` : ""}. Open in the gallery`,
      style: one.score ? { "--share": `${Math.round(22 * share(one.score))}%` } : {},
      on: { click: () => { state.at = one.at; state.view = "gallery"; update(); gallery.focus(0); } },
    }, el("b", { text: head }), isBest(one) ? el("span", { class: "best", text: " best" }) : null, el("small", { text: rest }));
  }

  /** The first numbers that the filters leave in any of these sets. */
  function numbersOf(some) {
    const found = new Map();
    for (const one of some) for (const picture of shown(one).slice(0, state.each)) found.set(picture.number, picture.order);
    return [...found].sort((a, b) => (a[1] < b[1] ? -1 : 1)).slice(0, state.each).map(([number]) => number);
  }

  function sideWidth(columns, each) {
    const { min, max, step } = widths(set() ?? sets[0]);
    if (zoom.side !== null) return zoom.side;
    const room = ($("pictures").clientWidth - 2 * 32 - 110) / columns - 24;
    const fitting = Math.floor((room - 3 * (each - 1)) / each / step) * step;
    return Math.min(Math.max(fitting, min), Math.min(max, Math.max(step, 96)));
  }

  function showSide() {
    const { across, down } = state;
    const columns = data.axes[across].values.map((_, i) => i);
    const rows = down < 0 ? [0] : data.axes[down].values.map((_, i) => i);
    const cellAt = (row, column) => byPlace.get(String(place({ [across]: column, ...(down < 0 ? {} : { [down]: row }) })));
    const visible = rows.flatMap((row) => columns.map((column) => cellAt(row, column))).filter(Boolean);
    const numbers = numbersOf(visible), wide = Math.ceil(Math.sqrt(numbers.length)) || 1;
    const width = sideWidth(columns.length, wide), words = wordsOf(state.search);

    const thumb = (one, number) => {
      const picture = one.byNumber.get(number), isThere = picture && (state.class === ALL || picture.class === state.class);
      if (!isThere || !isFound(picture, words)) {
        const size = { width: `${width}px`, height: `${heightOf(one, width)}px` };
        const text = isThere ? `seed ${number} is left out by the search` : `seed ${number} is not in this cell`;
        return el("span", { class: "none", role: "img", "aria-label": text, title: text, style: size });
      }
      const made = tile(false, { tabindex: "-1", "data-cell": one.index, "data-number": number, on: { click: () => { state.at = one.at; open(picture); } } });
      fill(made, picture, width, false);
      return made;
    };
    const cell = (one) => {
      if (!one) return el("td", { class: "cell", text: "no such cell" });
      const current = one === set();
      return el("td", { class: current ? "cell current" : "cell", "aria-current": current ? "true" : null }, goButton(one),
        el("div", { class: "thumbs", style: { "grid-template-columns": `repeat(${wide}, ${width}px)` } }, ...numbers.map((number) => thumb(one, number))));
    };

    const corner = down < 0 ? null : el("td");
    const head = [
      el("tr", {}, corner, el("th", { class: "axis-name", colspan: columns.length, scope: "colgroup", text: data.axes[across].name })),
      el("tr", {}, down < 0 ? null : el("th", { class: "axis-name", text: data.axes[down].name, scope: "col" }),
        ...columns.map((i) => el("th", { scope: "col", text: valueOf(across, i) }))),
    ];
    const body = rows.map((row) => el("tr", {},
      down < 0 ? null : el("th", { scope: "row", text: valueOf(down, row) }), ...columns.map((column) => cell(cellAt(row, column)))));
    const caption = el("caption", { class: "unseen", text: `Cells by ${data.axes[across].name}${down < 0 ? "" : ` and ${data.axes[down].name}`}` });
    const had = focusKey($("side"));
    $("side").replaceChildren(el("table", { class: `matrix${isCoarse(visible[0], width) ? " pixelated" : ""}` },
      caption, el("thead", {}, ...head), el("tbody", {}, ...body)), ...aboutScores());
    rove($("side").querySelectorAll("tbody button"), had);
    $("count").textContent = numbers.length ? `${counted(numbers.length, "seed")} in ${counted(visible.length, "cell")}` : "none";
    $("empty").hidden = numbers.length > 0;
    $("empty").textContent = state.search ? "No picture is left by the search." : "No picture has these seeds.";
  }

  /** One of the buttons is reached with Tab, the others from it with arrow keys. */
  function rove(buttons, key) {
    const all = [...buttons];
    for (const button of all) button.tabIndex = -1;
    const chosen = all.find((button) => keyOf(button) === key) ?? all[0];
    if (!chosen) return;
    chosen.tabIndex = 0;
    if (key !== undefined) chosen.focus({ preventScroll: true });
  }
  const keyOf = (button) => `${button.closest("td")?.cellIndex},${button.closest("tr")?.rowIndex},${button.dataset.number ?? "go"}`;
  const focusKey = (box) => (box.contains(document.activeElement) && document.activeElement.closest("td") ? keyOf(document.activeElement) : undefined);

  $("side").addEventListener("keydown", (event) => {
    const ways = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    const way = ways[event.key], from = event.target.closest("tbody button");
    if (!way || !from || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    const middle = (button) => { const box = button.getBoundingClientRect(); return [box.x + box.width / 2, box.y + box.height / 2]; };
    const [x, y] = middle(from);
    let nearest = null, least = Infinity;
    for (const button of $("side").querySelectorAll("tbody button")) {
      const [u, v] = middle(button), along = (u - x) * way[0] + (v - y) * way[1];
      // What lies in the way asked for, and rather straight ahead than aside.
      const aside = Math.abs((u - x) * way[1]) + Math.abs((v - y) * way[0]), distance = along + 3 * aside;
      if (button !== from && along > 1 && distance < least) { nearest = button; least = distance; }
    }
    if (!nearest) return;
    from.tabIndex = -1;
    nearest.tabIndex = 0;
    nearest.focus({ preventScroll: true });
    nearest.scrollIntoView({ block: "nearest", inline: "nearest" });
  });

  /** What the scores are, in sentences. */
  function aboutScores() {
    if (!scored.length) return [];
    const { score } = scored[0];
    const words = [`${score.short}: ${score.label}`, score.reference && `reference ${score.reference}`, "lower is better"];
    const warnings = [...new Set(scored.map((one) => one.score.warning).filter(Boolean))];
    return [el("p", { class: "about-score", text: `${words.filter(Boolean).join("; ")}.` }),
      ...warnings.map((text) => el("p", { class: "about-score problem", text }))];
  }

  // ---- The cells as a table -----------------------------------------------------------------------------------------------

  let order = { column: null, down: true };

  function showTable() {
    const scoreName = scored[0]?.score.short ?? "score";
    const columns = [
      ...data.axes.map((axis, i) => ({ name: axis.name, value: (one) => one.at[i], text: (one) => valueOf(i, one.at[i]) })),
      { name: "images", number: true, value: (one) => one.pictures.length,
        text: (one) => count(one.pictures.length) + (one.planned > one.pictures.length ? ` of ${count(one.planned)}` : "") },
      { name: "images/s", number: true, value: (one) => one.rate, text: (one) => one.rate_text?.split(" ")[0] ?? "" },
      ...(scored.length ? [{ name: scoreName, number: true, score: true, value: (one) => one.score?.value, text: (one) => one.score?.text ?? "" }] : []),
      ...(scored.some((one) => one.score.kid) ? [{ name: "KID", number: true, value: (one) => parseFloat(one.score?.kid), text: (one) => one.score?.kid ?? "" }] : []),
    ];
    const rows = [...sets].sort((a, b) => {
      const by = columns[order.column];
      if (!by) return 0;
      const [x, y] = [by.value(a), by.value(b)].map((value) => (value === undefined || value === null || Number.isNaN(value) ? Infinity : value));
      return x === y ? 0 : (x < y ? -1 : 1) * (order.down ? 1 : -1);
    });
    const header = columns.map((column, i) => el("th", {
      scope: "col", class: column.number ? "number" : null,
      "aria-sort": order.column === i ? (order.down ? "ascending" : "descending") : null,
    }, el("button", { type: "button", text: `${column.name}${order.column === i ? (order.down ? " ↑" : " ↓") : ""}`,
      on: { click: () => { order = { column: i, down: order.column === i ? !order.down : true }; showTable(); $("table").querySelectorAll("thead button")[i].focus(); } } })));
    const body = rows.map((one) => el("tr", { class: one === set() ? "current" : null },
      ...columns.map((column, i) => i === 0
        ? el("th", { scope: "row" }, el("button", { type: "button", text: column.text(one), "aria-label": `${one.about}: open in the gallery`,
          on: { click: () => { state.at = one.at; state.view = "gallery"; update(); gallery.focus(0); } } }))
        : el("td", {
          class: [column.number && "number", column.score && one.score && "shaded"].filter(Boolean).join(" ") || null,
          style: column.score && one.score ? { "--share": `${Math.round(22 * share(one.score))}%` } : {},
        }, column.score && isBest(one) ? el("span", { class: "best", text: "best " }) : null, column.text(one)))));
    $("table").replaceChildren(el("table", { class: "listing" }, el("caption", { class: "unseen", text: "Speed and score of each cell" }),
      el("thead", {}, el("tr", {}, ...header)), el("tbody", {}, ...body)), ...aboutScores());
    $("count").textContent = counted(sets.length, "cell");
    $("empty").hidden = true;
  }

  // ---- One picture and how it was made ---------------------------------------------------------------------------------

  const dialog = $("detail");
  const NAMES = { image: "Picture", strip: "Strip", sampling: "Sampling", scheduler: "Scheduler", model: "Model", runtime: "Runtime", timing: "Timing", config: "Config" };

  const opened = () => (state.open === null ? undefined : set()?.byNumber.get(state.open));

  function open(picture) {
    state.open = picture.number;
    showDetail(true);
    writeAddress();
  }

  function pairs(entries) {
    const list = el("dl", { class: "pairs" });
    for (const [name, text] of entries) {
      const long = text.startsWith("[") && text.length > 90;
      const value = el("dd", { class: text === "null" ? "null" : null, text: long ? undefined : text === "null" ? "none" : plain(text) });
      if (long) value.append(el("details", {}, el("summary", { text: `${counted(JSON.parse(text).length, "value")}` }), text.slice(1, -1)));
      list.append(el("dt", { text: name }), value);
    }
    return list;
  }

  /** The leaves of a section, its inner keys joined. */
  const flat = (tree, before = "") => [...tree].flatMap(([key, value]) => (value instanceof Map ? flat(value, `${before}${key} `) : [[`${before}${key}`, value]]));

  function showRecord(picture) {
    const record = picture.record(), box = $("record");
    if (!record) {
      box.replaceChildren(el("p", { class: "problem", text: "Nothing is known of how this picture was made: it has no sidecar, and no text inside." }));
      return;
    }
    const loose = [...record].filter(([key, value]) => !(value instanceof Map) && key !== "schema");
    const sections = [...record].filter(([, value]) => value instanceof Map);
    if (!record.has("image") || !(record.get("image") instanceof Map)) sections.unshift(["image", new Map()]);
    const parts = sections.map(([key, tree]) => {
      const entries = key === "image" ? [...loose, ...flat(tree)] : flat(tree);
      const heading = el("h3", { text: NAMES[key] ?? key });
      return key === "config"
        ? el("details", {}, el("summary", { text: "The resolved config" }), pairs(entries))
        : el("section", {}, heading, pairs(entries));
    });
    const text = layOut(record);
    box.replaceChildren(...parts, el("details", { id: "raw" }, el("summary", { text: "The sidecar as it is (JSON)" }),
      copyButton(text, "Copy JSON"), el("pre", { text })));
    box.scrollTop = 0;
  }

  function copyButton(text, name) {
    return el("button", { type: "button", class: "copy", text: name, on: { click: async (event) => {
      const button = event.target;
      const done = await copied(text);
      button.textContent = done ? "Copied" : "Select it and copy";
      $("said").textContent = button.textContent;
      setTimeout(() => { button.textContent = name; }, 1600);
    } } });
  }

  async function copied(text) {
    try {
      await navigator.clipboard.writeText(text);
      return true;
    } catch {
      const area = el("textarea", { class: "unseen" });
      area.value = text;
      dialog.append(area);
      area.select();
      const done = document.execCommand("copy");
      area.remove();
      return done;
    }
  }

  /** The command that makes a picture again, from the folder of this page; null where no seed alone makes it. */
  function replay(picture) {
    const schema = picture.value("schema");
    if (!schema || !/^\d+$/.test(picture.value("seed") ?? "") || plain(schema) !== "ddim-cli/sidecar/1") return null;
    const file = picture.source.startsWith("data:")
      ? [picture.set.folder, plain(picture.value("image", "file") ?? '""')].filter(Boolean).join("/") : decodeURIComponent(picture.source);
    const named = picture.value("created") ? file.replace(/\.(png|webp|jpg)$/, ".json") : file;
    const safe = named.startsWith("-") ? `./${named}` : named;
    return `ddim replay ${/^[\w@%+=:,./-]+$/.test(safe) ? safe : `'${safe.replaceAll("'", "'\\''")}'`} -o again`;
  }

  function showAgain(picture) {
    let command = null;
    try { command = replay(picture); } catch { /* a name that is no text */ }
    $("again").replaceChildren(...(command
      ? [el("h3", { text: "Make it again" }), el("div", { class: "command" }, el("code", { tabindex: "0", text: command }), copyButton(command, "Copy")),
        el("p", { class: "hint", text: "In the folder of this page." })]
      : picture.value("sampling", "between", "seeds") ? [el("p", { class: "hint", text: "No seed alone makes this picture: ddim interpolate does." })] : []));
  }

  /** The same seed in the other cells. */
  function showOthers(picture) {
    const others = sets.map((one) => one.byNumber.get(picture.number)).filter(Boolean);
    $("others").hidden = !isSweep || others.length < 2;
    if ($("others").hidden) return;
    const held = $("others").contains(document.activeElement);
    const strip = el("div", { class: "strip" }, ...others.map((other) => {
      const made = tile(true, { "aria-current": other === picture ? "true" : null,
        on: { click: () => { state.at = other.set.at; update(); } } });
      fill(made, other, 64, true);
      made.children[1].textContent = other.set.about;
      return made;
    }));
    strip.classList.toggle("pixelated", isCoarse(picture.set, 64));
    $("others").replaceChildren(el("h3", { text: `Seed ${picture.number} in all cells` }), strip);
    if (held) strip.querySelector("[aria-current]")?.focus();
  }

  function showImage(picture) {
    const [width, height] = sides(picture.set), frame = $("frame");
    // A strip takes the whole width, and what is known of it stands below.
    const wide = width > 2 * height;
    dialog.classList.toggle("wide", wide);
    const room = dialog.clientWidth * (window.innerWidth > 760 && !wide ? 0.53 : 1) - 40;
    const tall = Math.min(560, dialog.clientHeight * (isSweep ? 0.5 : 0.62));
    const factor = Math.min(room / width, tall / height);
    const shownWidth = Math.round(width * (factor >= 1 ? Math.min(Math.floor(factor), 16) : Math.min(room / width, 1)));
    const image = el("img", { alt: picture.describe(), width: shownWidth, height: heightOf(picture.set, shownWidth), class: isCoarse(picture.set, shownWidth) ? "pixelated" : null });
    image.addEventListener("error", () => { $("broken").hidden = false; });
    $("broken").hidden = true;
    image.src = picture.source;
    frame.replaceChildren(image);
  }

  function showPrompts(picture) {
    const told = [["Prompt", picture.prompt], ["Negative prompt", picture.negative]].filter(([, text]) => text);
    $("prompts").hidden = !told.length;
    $("prompts").replaceChildren(...told.flatMap(([name, text]) => [el("dt", { text: name }), el("dd", { text })]));
  }

  /** Have the dialog show what is open, or be closed. */
  function showDetail(announce = false) {
    const picture = opened();
    if (!picture) {
      state.open = null;
      if (dialog.open) dialog.close();
      return;
    }
    if (!dialog.open) dialog.showModal();
    const list = shown(picture.set), at = list.indexOf(picture);
    $("detail-title").textContent = picture.name[0].toUpperCase() + picture.name.slice(1);
    $("detail-place").textContent = [picture.label, picture.class && `class ${picture.class}`, picture.set.about, at < 0 ? "" : `${count(at + 1)} of ${count(list.length)}`].filter(Boolean).join(" · ");
    $("previous").disabled = at <= 0;
    $("next").disabled = at < 0 || at >= list.length - 1;
    showImage(picture);
    showPrompts(picture);
    showAgain(picture);
    showOthers(picture);
    showRecord(picture);
    if (announce) $("said").textContent = picture.describe();
  }

  function step(move) {
    const picture = opened(), list = picture ? shown(picture.set) : [];
    const next = list[typeof move === "number" ? list.indexOf(picture) + move : move === "first" ? 0 : list.length - 1];
    if (!next || next === picture) return;
    // A button that becomes useless would lose the focus.
    open(next);
    if (document.activeElement === document.body || document.activeElement.disabled) $("close").focus();
  }

  dialog.addEventListener("close", () => {
    const number = state.open;
    state.open = null;
    writeAddress();
    if (number === null) return;
    if (state.view === "gallery") {
      const at = gallery.pictures.findIndex((picture) => picture.number === number);
      gallery.focus(at < 0 ? gallery.current : at);
    } else if (state.view === "side") {
      showSide();
      const thumb = $("side").querySelector(`[data-cell="${set().index}"][data-number="${number}"]`) ?? $("side").querySelector(`td.current button`);
      if (thumb) rove($("side").querySelectorAll("tbody button"), keyOf(thumb));
    }
  });
  dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });
  dialog.addEventListener("keydown", (event) => {
    const moves = { ArrowLeft: -1, ArrowRight: 1, Home: "first", End: "last" };
    const move = moves[event.key];
    const scrolls = (event.key === "Home" || event.key === "End") && event.target.closest("#record");
    if (move === undefined || scrolls || event.ctrlKey || event.metaKey || event.altKey || event.target.closest("code")) return;
    event.preventDefault();
    step(move);
  });
  $("previous").addEventListener("click", () => step(-1));
  $("next").addEventListener("click", () => step(1));
  $("close").addEventListener("click", () => dialog.close());

  // ---- What stands around the pictures -------------------------------------------------------------------------------

  function showNotices() {
    const notices = [];
    const missing = sets.filter((one) => one.planned > one.pictures.length);
    if (missing.length && isSweep) {
      notices.push(`${counted(missing.length, "cell")} of ${count(sets.length)} ${missing.length === 1 ? "has" : "have"} pictures still to be made; the same command makes them.`);
    } else if (missing.length) {
      const [one] = missing;
      notices.push(`Not finished: ${count(one.pictures.length)} of ${counted(one.planned, "planned image")} ${one.pictures.length === 1 ? "is" : "are"} there. The same command makes the rest; then run ddim report again.`);
    }
    $("notices").replaceChildren(...notices.map((text) => el("p", { class: "notice", text })));
    if (data.problems.length) {
      $("notices").append(el("details", { class: "notice" }, el("summary", { text: counted(data.problems.length, "problem") }),
        el("ul", {}, ...data.problems.map((text) => el("li", { text })))));
    }
  }

  function showHead() {
    const facts = data.facts ?? set().facts;
    $("facts").replaceChildren(...facts.map(([name, value]) => el("div", {}, el("dt", { text: name }), el("dd", { text: value }))));
    const sections = set()?.settings ?? [];
    $("settings").hidden = !sections.length;
    $("settings").querySelector("summary").textContent = isSweep && set() ? `Settings of ${set().about}` : "Settings";
    $("settings").querySelector(".sections").replaceChildren(...sections.map(([name, entries]) =>
      el("section", {}, el("h3", { text: NAMES[name] ?? name }), pairs(entries))));
  }

  function buildControls() {
    $("views").hidden = views.length < 2;
    $("views").replaceChildren(...views.map(([name, title]) => el("button", { type: "button", "data-view": name, text: title,
      on: { click: () => { state.view = name; update(); } } })));
    $("axes").hidden = !isSweep;
    $("axes").replaceChildren(...data.axes.map((axis, i) => {
      const id = `axis-${i}`, last = axis.values.length - 1;
      const slider = el("input", { type: "range", id, min: 0, max: last, step: 1, disabled: last === 0,
        on: { input: (event) => { state.at = place({ [i]: Number(event.target.value) }); update(); } } });
      const many = axis.values.length > 8 || axis.values.join("").length > 30;
      return el("div", { class: "axis" }, el("label", { for: id }, el("span", { text: axis.name }), el("output", { for: id })), slider,
        many || !last ? null : el("div", { class: "ticks", "aria-hidden": "true" }, ...axis.values.map((text) => el("span", { text }))));
    }));
    for (const side of ["across", "down"]) {
      $(side).replaceChildren(...data.axes.map((axis, i) => el("option", { value: i, text: axis.name })));
      $(side).addEventListener("change", () => {
        const other = side === "across" ? "down" : "across", before = state[side];
        state[side] = Number($(side).value);
        if (state[other] === state[side]) state[other] = before;
        update();
      });
    }
    $("sets-field").hidden = isSweep || sets.length < 2;
    $("sets").replaceChildren(...sets.map((one, i) => el("option", { value: i, text: `${one.name} (${count(one.pictures.length)})` })));
    $("sets").addEventListener("change", () => { state.set = Number($("sets").value); zoom.gallery = null; update(); });
    $("class").replaceChildren(el("option", { value: ALL, text: "all" }), ...classes.map((text) => el("option", { value: text, text })));
    $("class").addEventListener("change", () => { state.class = $("class").value; update(); });
    $("each").addEventListener("input", () => { state.each = Number($("each").value); update(); });
    $("zoom").addEventListener("input", () => {
      zoom[state.view === "side" ? "side" : "gallery"] = Number($("zoom").value);
      update();
    });
    $("search").addEventListener("input", () => { state.search = $("search").value.trim(); update(); });
    $("search").addEventListener("keydown", (event) => {
      if (event.key !== "Escape" || !$("search").value) return;
      event.preventDefault();
      $("search").value = state.search = ALL;
      update();
    });
    if (searches) $("slash").textContent = "searches prompts and names";
    $("filter").addEventListener("input", () => readFilter());
    $("filter").addEventListener("keydown", (event) => {
      if (event.key !== "Escape" || !$("filter").value) return;
      event.preventDefault();
      $("filter").value = "";
      readFilter();
    });
    $("skip").addEventListener("click", (event) => {
      event.preventDefault();
      if (state.view === "gallery" && gallery.pictures.length) gallery.focus(gallery.current);
      else $("pictures").focus();
    });
    document.addEventListener("keydown", (event) => {
      if (event.key !== "/" || dialog.open || event.target.closest("input, select") || event.ctrlKey || event.metaKey) return;
      event.preventDefault();
      const field = searches ? $("search") : $("filter");
      field.focus();
      field.select();
    });
  }

  function readFilter() {
    const text = $("filter").value.trim();
    let problem = "";
    try {
      const found = text ? parseList(text) : null;
      if (text && !found) return;
      ranges = found;
      state.seeds = text;
    } catch (error) {
      problem = error.message;
    }
    $("filter-problem").textContent = problem;
    $("filter-problem").hidden = !problem;
    $("filter").toggleAttribute("aria-invalid", false);
    if (problem) $("filter").setAttribute("aria-invalid", "true");
    else update();
  }

  function showControls() {
    for (const button of $("views").children) button.setAttribute("aria-pressed", button.dataset.view === state.view);
    data.axes.forEach((axis, i) => {
      const slider = $(`axis-${i}`), label = valueOf(i, state.at[i]);
      slider.value = state.at[i];
      slider.setAttribute("aria-valuetext", label);
      slider.parentElement.querySelector("output").textContent = label;
    });
    // Of two axes the one that is not across is down.
    $("across-field").hidden = state.view !== "side" || data.axes.length < 2;
    $("down-field").hidden = state.view !== "side" || data.axes.length < 3;
    $("across").value = state.across;
    $("down").value = state.down;
    $("sets").value = state.set;
    $("class").value = state.class;
    $("each-field").hidden = state.view !== "side";
    $("each").value = state.each;
    $("each").setAttribute("aria-valuetext", counted(state.each, "picture"));
    $("filter-name").textContent = set()?.noun === "frame" ? "Frames" : "Seeds";
    $("search-field").hidden = !searches || state.view === "table";
    if (document.activeElement !== $("search")) $("search").value = state.search;
    if (document.activeElement !== $("filter")) $("filter").value = state.seeds;
    const range = widths(set());
    $("zoom-field").hidden = $("filter-field").hidden = state.view === "table";
    $("class-field").hidden = !classes.length || state.view === "table";
    Object.assign($("zoom"), { min: range.min, max: range.max, step: range.step });
    $("zoom").value = state.view === "side" ? sideWidth(data.axes[state.across].values.length, Math.ceil(Math.sqrt(state.each))) : zoom.gallery ?? range.usual;
    $("zoom").setAttribute("aria-valuetext", `${$("zoom").value} pixels`);
  }

  function showGallery() {
    gallery.show();
    const one = set(), number = gallery.pictures.length, all = one?.pictures.length ?? 0;
    $("count").textContent = number === all ? counted(all, one?.noun === "frame" ? "frame" : "image") : `${count(number)} of ${count(all)}`;
    $("empty").hidden = number > 0;
    $("empty").textContent = !one ? "There is no such cell." : !all ? "Nothing has been made here yet." : "No picture is left by the filter.";
  }

  function update() {
    showControls();
    showHead();
    for (const view of ["gallery", "side", "table"]) $(view).hidden = state.view !== view;
    ({ gallery: showGallery, side: showSide, table: showTable })[state.view]();
    showDetail();
    writeAddress();
  }

  // ---- Light and dark --------------------------------------------------------------------------------------------------

  const THEME = "ddim-report-theme";
  const asksForDark = window.matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (document.documentElement.dataset.theme ?? (asksForDark.matches ? "dark" : "light")) === "dark";
  function showTheme() { $("theme").textContent = isDark() ? "Light theme" : "Dark theme"; }
  try {
    const kept = localStorage.getItem(THEME);
    if (kept === "light" || kept === "dark") document.documentElement.dataset.theme = kept;
  } catch { /* files may have no storage */ }
  $("theme").addEventListener("click", () => {
    document.documentElement.dataset.theme = isDark() ? "light" : "dark";
    try { localStorage.setItem(THEME, document.documentElement.dataset.theme); } catch { /* as above */ }
    showTheme();
  });
  asksForDark.addEventListener("change", showTheme);

  // ---- Begin ------------------------------------------------------------------------------------------------------------

  let waiting = false;
  function soon() {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => {
      waiting = false;
      if (state.view === "gallery") gallery.render();
    });
  }
  window.addEventListener("scroll", soon, { passive: true });
  window.addEventListener("hashchange", () => { readAddress(); update(); });
  let room = 0;
  new ResizeObserver(() => {
    document.documentElement.style.setProperty("--controls", getComputedStyle($("controls")).position === "sticky" ? `${$("controls").offsetHeight}px` : "0px");
    if (room && room !== $("pictures").clientWidth) update();
    room = $("pictures").clientWidth;
  }).observe(document.body);
  window.addEventListener("resize", soon);

  showTheme();
  showNotices();
  buildControls();
  readAddress();
  update();
})();
