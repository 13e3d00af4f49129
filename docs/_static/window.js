// SPDX-License-Identifier: Apache-2.0
// The geometry of nearsight.Window along one axis, line by line as in src/nearsight/window.py, which a test holds it to.
"use strict";

globalThis.NearsightWindow = (() => {
  const HIDDEN = -1; // outside the map, or behind a causal query: takes no part
  const ZERO = -2; // outside the map, and takes part as a zero key with a zero value

  const left = (axis) => (axis.causal ? axis.kernelSize - 1 : Math.floor(axis.kernelSize / 2));
  const byOffset = (axis) => axis.border === "shift" || axis.sharedBy > 1;
  const tableSize = (axis) => (byOffset(axis) ? 2 * axis.kernelSize - 1 : axis.kernelSize);
  const zeroEntry = (axis) => (byOffset(axis) ? axis.kernelSize - 1 : left(axis));
  const outputSize = (axis, cells) => Math.ceil(cells / axis.stride);

  // The step that the window of a query is laid around, on a dilation phase of so many steps.
  function leader(axis, step, steps) {
    if (axis.sharedBy === 1) {
      return step;
    }
    const first = Math.floor(step / axis.sharedBy) * axis.sharedBy;
    return axis.causal ? Math.min(first + axis.sharedBy - 1, steps - 1) : first + Math.floor(axis.sharedBy / 2);
  }

  function firstStep(axis, step, steps) {
    const first = leader(axis, step, steps) - left(axis);
    return axis.border === "shift" && !axis.causal ? Math.max(Math.min(first, steps - axis.kernelSize), 0) : first;
  }

  // The [cell, entry] of each of the places that the window of a query has.
  function neighbours(axis, cells, query) {
    const at = query * axis.stride;
    const step = Math.floor(at / axis.dilation);
    const phase = at % axis.dilation;
    const steps = Math.floor((cells - phase + axis.dilation - 1) / axis.dilation);
    const first = firstStep(axis, step, steps);
    const found = [];
    for (let place = first; place < first + axis.kernelSize; place += 1) {
      const entry = byOffset(axis) ? place - step + axis.kernelSize - 1 : place - first;
      let cell = phase + place * axis.dilation;
      if (axis.border === "wrap") {
        cell = ((cell % cells) + cells) % cells;
      } else if (place < 0 || place >= steps) {
        cell = axis.border === "zeros" ? ZERO : HIDDEN;
      }
      if (axis.causal && place > step) {
        cell = HIDDEN;
      }
      found.push([cell, Math.min(Math.max(entry, 0), tableSize(axis) - 1)]);
    }
    return found;
  }

  return { HIDDEN, ZERO, tableSize, zeroEntry, outputSize, neighbours };
})();
