// SPDX-License-Identifier: Apache-2.0
// A figure in which the reader turns a window: what it sees, which entries of its tables it uses, and what it costs.
"use strict";

(() => {
  const CELLS = [12, 16]; // of the map, along rows and columns
  const BORDERS = ["mask", "zeros", "shift", "wrap"];
  const TEXTS = {
    en: {
      example: "example",
      own: "your own",
      kernelSize: "kernel_size",
      dilation: "dilation",
      stride: "stride",
      sharedBy: "shared_by",
      border: ["border, rows", "border, columns"],
      causal: ["causal rows", "causal columns"],
      query: ["query, row", "query, column"],
      window: "window",
      map: "The map. The query is blue, what it sees is light blue; rings are the queries that share its window. Arrow keys move the query.",
      table: "The entries of a position table that this query uses; the framed one is its own cell's.",
      said: (s) =>
        `The query at row ${s.at[0]}, column ${s.at[1]} sees ${s.seen} cells${s.again}. Position tables have ${s.table[0]} × ${s.table[1]} entries, of which it uses ${s.used}.`,
      twice: (n) => `, ${n} of them more than once`,
      zeros: (n) => ` and ${n} zeros outside the map`,
      cost: (s) =>
        `All ${s.queries} queries together look at ${s.pairs} pairs; global attention would look at ${s.all}: ${s.share} %.`,
    },
    fr: {
      example: "exemple",
      own: "le vôtre",
      kernelSize: "kernel_size",
      dilation: "dilation",
      stride: "stride",
      sharedBy: "shared_by",
      border: ["border, lignes", "border, colonnes"],
      causal: ["lignes causales", "colonnes causales"],
      query: ["requête, ligne", "requête, colonne"],
      window: "fenêtre",
      map: "La carte. La requête est en bleu, ce qu’elle voit en bleu clair ; les anneaux sont les requêtes qui partagent sa fenêtre. Les flèches du clavier déplacent la requête.",
      table: "Les entrées d’une table de positions dont se sert cette requête ; celle de sa propre cellule est encadrée.",
      said: (s) =>
        `La requête de la ligne ${s.at[0]}, colonne ${s.at[1]} voit ${s.seen} cellules${s.again}. Les tables de positions ont ${s.table[0]} × ${s.table[1]} entrées ; elle en utilise ${s.used}.`,
      twice: (n) => `, dont ${n} plus d’une fois`,
      zeros: (n) => ` et ${n} zéros hors de la carte`,
      cost: (s) =>
        `Les ${s.queries} requêtes regardent ensemble ${s.pairs} paires ; l’attention globale en regarderait ${s.all} : ${s.share} %.`,
    },
  };
  const PLAIN = { kernelSize: 5, dilation: 1, stride: 1, sharedBy: 1, border: ["mask", "mask"], causal: [false, false] };
  const EXAMPLES = {
    "SASA": {},
    "NAT, NATTEN": { border: ["shift", "shift"] },
    "DiNAT": { kernelSize: 3, dilation: 3, border: ["shift", "shift"] },
    "HaloNet": { kernelSize: 6, sharedBy: 4 },
    "Swin": { kernelSize: 4, sharedBy: 4 },
    "F.unfold": { border: ["zeros", "zeros"] },
    "panorama": { border: ["mask", "wrap"] },
    "causal": { causal: [true, false] },
  };
  const RANGES = { kernelSize: [1, 9], dilation: [1, 3], stride: [1, 3], sharedBy: [1, 9] };

  const axesOf = (state) =>
    [0, 1].map((place) => ({
      kernelSize: state.kernelSize,
      dilation: state.dilation,
      stride: state.stride,
      sharedBy: state.sharedBy,
      border: state.border[place],
      causal: state.causal[place],
    }));

  // The call of Python's that makes this window.
  function codeOf(state) {
    const words = { dilation: "dilation", stride: "stride", sharedBy: "shared_by" };
    const parts = [`${state.kernelSize}`];
    for (const [name, word] of Object.entries(words)) {
      if (state[name] !== 1) {
        parts.push(`${word}=${state[name]}`);
      }
    }
    const [rows, columns] = state.border;
    if (rows !== columns) {
      parts.push(`border=("${rows}", "${columns}")`);
    } else if (rows !== "mask") {
      parts.push(`border="${rows}"`);
    }
    const python = state.causal.map((one) => (one ? "True" : "False"));
    if (python[0] !== python[1]) {
      parts.push(`causal=(${python.join(", ")})`);
    } else if (state.causal[0]) {
      parts.push("causal=True");
    }
    return `ns.Window(${parts.join(", ")})`;
  }

  // What the query sees: how often each cell, which entries, and how many zeros.
  function lookAt(state) {
    const axes = axesOf(state);
    const [rows, columns] = axes.map((axis, place) =>
      NearsightWindow.neighbours(axis, CELLS[place], state.query[place]).filter(
        ([cell]) => cell !== NearsightWindow.HIDDEN,
      ),
    );
    const counts = new Map();
    const entries = new Set();
    let zeros = 0;
    for (const [row, rowEntry] of rows) {
      for (const [column, columnEntry] of columns) {
        entries.add(`${rowEntry},${columnEntry}`);
        if (row === NearsightWindow.ZERO || column === NearsightWindow.ZERO) {
          zeros += 1;
        } else {
          counts.set(`${row},${column}`, (counts.get(`${row},${column}`) ?? 0) + 1);
        }
      }
    }
    return { counts, entries, zeros };
  }

  // Pairs of a query and a place that takes part, of all queries: a product, since the axes know nothing of each other.
  function pairsOf(axes) {
    return axes
      .map((axis, place) => {
        let sum = 0;
        for (let query = 0; query < NearsightWindow.outputSize(axis, CELLS[place]); query += 1) {
          const found = NearsightWindow.neighbours(axis, CELLS[place], query);
          sum += found.filter(([cell]) => cell !== NearsightWindow.HIDDEN).length;
        }
        return sum;
      })
      .reduce((product, sum) => product * sum, 1);
  }

  function element(name, attributes = {}, ...children) {
    const made = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) {
      made.setAttribute(key, value);
    }
    made.append(...children);
    return made;
  }

  function drawn(name, attributes) {
    const made = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) {
      made.setAttribute(key, value);
    }
    return made;
  }

  function build(root) {
    const texts = TEXTS[document.documentElement.lang.slice(0, 2)] ?? TEXTS.en;
    const state = { ...structuredClone(PLAIN), query: [5, 7] };
    const controls = {};

    function range(label, least, most, get, set) {
      const input = element("input", { type: "range", min: least, max: most, step: 1 });
      const shown = element("output");
      input.addEventListener("input", () => {
        set(Number(input.value));
        update();
      });
      return {
        node: element("label", {}, label, input, shown),
        refresh: (bound) => {
          input.max = bound ?? most;
          input.value = get();
          shown.value = get();
        },
      };
    }

    function choice(label, options, get, set) {
      const input = element("select");
      for (const [value, text] of options) {
        input.append(element("option", { value }, text));
      }
      input.addEventListener("change", () => {
        set(input.value);
        update();
      });
      return {
        node: element("label", { class: "choice" }, label, input),
        refresh: () => {
          input.value = get();
        },
      };
    }

    function tick(label, get, set) {
      const input = element("input", { type: "checkbox" });
      input.addEventListener("change", () => {
        set(input.checked);
        update();
      });
      return {
        node: element("label", { class: "choice" }, label, input),
        refresh: () => {
          input.checked = get();
        },
      };
    }

    const nameOf = () =>
      Object.keys(EXAMPLES).find((name) => codeOf({ ...PLAIN, ...EXAMPLES[name] }) === codeOf(state)) ?? "";
    controls.example = choice(
      texts.example,
      [["", texts.own], ...Object.keys(EXAMPLES).map((name) => [name, name])],
      nameOf,
      (name) => Object.assign(state, structuredClone({ ...PLAIN, ...EXAMPLES[name] })),
    );
    for (const [name, [least, most]] of Object.entries(RANGES)) {
      controls[name] = range(
        texts[name],
        least,
        most,
        () => state[name],
        (value) => {
          state[name] = value;
        },
      );
    }
    for (const place of [0, 1]) {
      controls[`border${place}`] = choice(
        texts.border[place],
        BORDERS.map((border) => [border, border]),
        () => state.border[place],
        (value) => {
          state.border[place] = value;
        },
      );
    }
    for (const place of [0, 1]) {
      controls[`causal${place}`] = tick(
        texts.causal[place],
        () => state.causal[place],
        (value) => {
          state.causal[place] = value;
        },
      );
    }
    for (const place of [0, 1]) {
      controls[`query${place}`] = range(
        texts.query[place],
        0,
        CELLS[place] - 1,
        () => state.query[place],
        (value) => {
          state.query[place] = value;
        },
      );
    }

    const code = element("code", { class: "code" });
    const map = drawn("svg", { viewBox: `-0.1 -0.1 ${CELLS[1] + 0.2} ${CELLS[0] + 0.2}`, role: "img", tabindex: 0 });
    const table = drawn("svg", { class: "table", role: "img" });
    const said = element("p", { "aria-live": "polite" });
    const share = element("div");
    const cost = element("p");
    const legend = element("legend", {}, texts.window);
    root.append(
      element("fieldset", {}, legend, ...Object.values(controls).map((control) => control.node)),
      element("figure", {}, map, element("figcaption", {}, texts.map), code, said),
      element(
        "figure",
        {},
        table,
        element("figcaption", {}, texts.table),
        cost,
        element("div", { class: "bar", "aria-hidden": "true" }, share),
      ),
    );

    function moveTo(row, column) {
      const axes = axesOf(state);
      state.query = [row, column].map((value, place) =>
        Math.min(Math.max(value, 0), NearsightWindow.outputSize(axes[place], CELLS[place]) - 1),
      );
    }

    map.addEventListener("keydown", (event) => {
      const steps = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
      if (steps) {
        event.preventDefault();
        moveTo(state.query[0] + steps[0], state.query[1] + steps[1]);
        update();
      }
    });
    function follow(event) {
      if (event.buttons) {
        const place = new DOMPoint(event.clientX, event.clientY).matrixTransform(map.getScreenCTM().inverse());
        moveTo(Math.floor(place.y / state.stride), Math.floor(place.x / state.stride));
        update();
      }
    }
    map.addEventListener("pointerdown", follow);
    map.addEventListener("pointermove", follow);

    function update() {
      state.sharedBy = Math.min(state.sharedBy, state.kernelSize);
      moveTo(...state.query);
      const axes = axesOf(state);
      const sizes = axes.map((axis, place) => NearsightWindow.outputSize(axis, CELLS[place]));
      for (const [name, control] of Object.entries(controls)) {
        const bound = { sharedBy: state.kernelSize, query0: sizes[0] - 1, query1: sizes[1] - 1 }[name];
        control.refresh(bound);
      }
      const found = lookAt(state);
      drawMap(axes, sizes, found);
      drawTable(axes, found);
      const seen = [...found.counts.values()];
      const repeated = seen.filter((count) => count > 1).length;
      const pairs = pairsOf(axes);
      const all = sizes[0] * sizes[1] * CELLS[0] * CELLS[1];
      const percent = (100 * pairs) / all;
      const facts = {
        at: state.query.map((query) => query * state.stride),
        seen: seen.length,
        again: (repeated ? texts.twice(repeated) : "") + (found.zeros ? texts.zeros(found.zeros) : ""),
        table: axes.map(NearsightWindow.tableSize),
        used: found.entries.size,
        queries: sizes[0] * sizes[1],
        pairs: pairs.toLocaleString(document.documentElement.lang || "en"),
        all: all.toLocaleString(document.documentElement.lang || "en"),
        share: percent.toLocaleString(document.documentElement.lang || "en", { maximumSignificantDigits: 2 }),
      };
      code.textContent = codeOf(state);
      said.textContent = texts.said(facts);
      cost.textContent = texts.cost(facts);
      share.style.width = `${Math.min(percent, 100)}%`;
      map.setAttribute("aria-label", facts.seen ? texts.said(facts) : texts.map);
      table.setAttribute("aria-label", texts.table);
      root.dataset.seen = JSON.stringify([...found.counts]);
    }

    function drawMap(axes, sizes, found) {
      const nodes = [];
      for (let row = 0; row < CELLS[0]; row += 1) {
        for (let column = 0; column < CELLS[1]; column += 1) {
          const kind = found.counts.has(`${row},${column}`) ? "seen" : "";
          nodes.push(drawn("rect", { x: column, y: row, width: 1, height: 1, class: kind }));
        }
      }
      const windows = axes.map((axis, place) =>
        Array.from({ length: sizes[place] }, (_, query) =>
          JSON.stringify(NearsightWindow.neighbours({ ...axis, causal: false }, CELLS[place], query).map(([cell]) => cell)),
        ),
      );
      for (let row = 0; row < sizes[0]; row += 1) {
        for (let column = 0; column < sizes[1]; column += 1) {
          const own = row === state.query[0] && column === state.query[1];
          const sharing =
            state.sharedBy > 1 &&
            windows[0][row] === windows[0][state.query[0]] &&
            windows[1][column] === windows[1][state.query[1]];
          const place = { cx: column * state.stride + 0.5, cy: row * state.stride + 0.5 };
          const kind = own ? "query" : sharing ? "sharing" : "";
          nodes.push(drawn("circle", { ...place, r: own ? 0.34 : sharing ? 0.28 : 0.08, class: kind }));
        }
      }
      map.replaceChildren(...nodes);
    }

    function drawTable(axes, found) {
      const [height, width] = axes.map(NearsightWindow.tableSize);
      const [zeroRow, zeroColumn] = axes.map(NearsightWindow.zeroEntry);
      table.setAttribute("viewBox", `-0.1 -0.1 ${width + 0.2} ${height + 0.2}`);
      const nodes = [];
      for (let row = 0; row < height; row += 1) {
        for (let column = 0; column < width; column += 1) {
          const used = found.entries.has(`${row},${column}`) ? "used" : "";
          nodes.push(drawn("rect", { x: column, y: row, width: 1, height: 1, class: used }));
        }
      }
      nodes.push(drawn("rect", { x: zeroColumn, y: zeroRow, width: 1, height: 1, class: "own" }));
      table.replaceChildren(...nodes);
    }

    update();
  }

  for (const root of document.querySelectorAll(".playground")) {
    build(root);
  }
})();
