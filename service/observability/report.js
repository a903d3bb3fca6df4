// The values under the pointer.  The curves are there without it.
function drawValues() { for (const figure of document.querySelectorAll(".chart")) {
  const { x, lines } = JSON.parse(figure.querySelector("script").textContent);
  const area = figure.querySelector(".area");
  const add = (name) => area.appendChild(Object.assign(document.createElement("div"), { className: name }));
  const marks = [];

  const nearest = (points, step) => {
    let low = 0, high = points.length - 1;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (points[middle][0] < step) low = middle + 1; else high = middle;
    }
    const before = points[low - 1];
    return before && step - before[0] < points[low][0] - step ? before : points[low];
  };

  const leave = () => { while (marks.length) marks.pop().remove(); };

  const show = (event) => {
    leave();
    const box = area.getBoundingClientRect();
    const across = Math.min(1, Math.max(0, (event.clientX - box.left) / box.width));
    const found = lines.filter((line) => line.points.length)
      .map((line) => ({ line, point: nearest(line.points, x[0] + across * (x[1] - x[0])) }));
    if (!found.length) return;
    const place = (step) => (step - x[0]) / (x[1] - x[0]);
    const rule = add("rule"), tip = add("tip");
    marks.push(rule, tip);
    rule.style.left = `${100 * across}%`;
    for (const { line, point } of found) {
      const dot = add(`dot c${line.colour}`);
      dot.style.left = `${100 * place(point[0])}%`;
      dot.style.top = `${100 * point[2]}%`;
      const row = document.createElement("span");
      row.className = `c${line.colour}`;
      const value = Object.assign(document.createElement("b"), { textContent: point[1] });
      row.append(document.createElement("i"), `${line.label} · step ${point[0].toLocaleString("en")}`, value);
      tip.append(row);
      marks.push(dot);
    }
    const beside = across > 0.5 ? across * box.width - tip.offsetWidth - 10 : across * box.width + 10;
    tip.style.left = `${Math.max(0, Math.min(beside, box.width - tip.offsetWidth))}px`;
  };

  area.addEventListener("pointermove", show);
  area.addEventListener("pointerdown", show);
  area.addEventListener("pointerleave", leave);
} }
drawValues();
