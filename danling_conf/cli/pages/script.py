"""Script of all pages: tooltips, zoom along the x axis (drag; a double click goes back), and tables that sort by a
click. Pages are readable without it."""

from __future__ import annotations

SCRIPT = """
(() => {
  const tip = document.getElementById('tip');
  const show = (event, words) => {
    tip.textContent = words; tip.style.display = 'block';
    const box = tip.getBoundingClientRect();
    const left = event.clientX + 14 + box.width > innerWidth ? event.clientX - box.width - 14 : event.clientX + 14;
    tip.style.left = Math.max(4, left) + 'px';
    tip.style.top = Math.min(event.clientY + 14, innerHeight - box.height - 6) + 'px';
  };
  const number = value => Math.abs(value) >= 1e6 || (value && Math.abs(value) < 1e-3)
    ? value.toExponential(3) : String(+value.toPrecision(6));
  for (const svg of document.querySelectorAll('svg[data-lines]')) {
    const lines = JSON.parse(svg.dataset.lines), cross = svg.querySelector('.cross');
    const left = +svg.dataset.left, right = +svg.dataset.right, chosen = svg.querySelector('.chosen');
    const curves = [...svg.querySelectorAll('.curves .path')], marks = [...svg.querySelectorAll('.curves .mark')];
    const ticks = [...svg.querySelectorAll('.ticks text')];
    for (const item of [...marks, ...ticks]) item.dataset.at = item.getAttribute(item.matches('.mark') ? 'cx' : 'x');
    for (const line of lines) for (const point of line.points) point.push(point[0]);
    let from = null;
    const at = event => { const box = svg.getBoundingClientRect();
      return (event.clientX - box.left) / box.width * svg.viewBox.baseVal.width; };
    const inside = x => Math.min(right, Math.max(left, x));
    const zoom = (low, high) => {
      const place = x => left + (x - low) / (high - low) * (right - left);
      lines.forEach((line, index) => {
        for (const point of line.points) point[0] = place(point[4]);
        curves[index].setAttribute('d', 'M' + line.points.map(p => p[0].toFixed(1) + ' ' + p[1]).join('L'));
      });
      for (const mark of marks) mark.setAttribute('cx', place(+mark.dataset.at));
      for (const tick of ticks) { const x = place(+tick.dataset.at); tick.setAttribute('x', x);
        tick.style.visibility = x < left - 1 || x > right + 1 ? 'hidden' : 'visible'; }
    };
    svg.addEventListener('pointerdown', event => { from = inside(at(event)); });
    svg.addEventListener('dblclick', () => zoom(left, right));
    svg.addEventListener('pointerup', event => {
      const to = inside(at(event)), low = Math.min(from, to), high = Math.max(from, to);
      chosen.style.visibility = 'hidden';
      if (from !== null && high - low > 8) {
        const first = lines.flatMap(line => line.points)[0], last = lines.flatMap(line => line.points).at(-1);
        const scale = last[0] === first[0] ? 1 : (last[4] - first[4]) / (last[0] - first[0]);
        zoom(first[4] + (low - first[0]) * scale, first[4] + (high - first[0]) * scale);
      }
      from = null;
    });
    svg.addEventListener('pointermove', event => {
      const x = at(event);
      if (from !== null) {
        chosen.setAttribute('x', Math.min(from, inside(x))); chosen.setAttribute('width', Math.abs(inside(x) - from));
        chosen.style.visibility = 'visible';
      }
      let best = null;
      for (const line of lines) for (const point of line.points) if (point[0] >= left - 1 && point[0] <= right + 1)
        if (best === null || Math.abs(point[0] - x) < Math.abs(best[0] - x)) best = point;
      if (!best) return;
      const said = [svg.dataset.x + ' ' + best[2]];
      for (const line of lines) {
        let near = null;
        for (const point of line.points) if (!near || Math.abs(point[0] - best[0]) < Math.abs(near[0] - best[0])) near =
        point;
        if (near && Math.abs(near[0] - best[0]) < 12) said.push(line.name + ': ' + number(near[3]));
      }
      cross.setAttribute('x1', best[0]); cross.setAttribute('x2', best[0]); cross.style.visibility = 'visible';
      show(event, said.join('\\n'));
    });
    svg.addEventListener('pointerleave', () => {
      from = null; chosen.style.visibility = 'hidden'; cross.style.visibility = 'hidden'; tip.style.display = 'none';
    });
  }
  for (const mark of document.querySelectorAll('[data-tip]')) {
    mark.addEventListener('pointermove', event => show(event, mark.dataset.tip));
    mark.addEventListener('pointerleave', () => { tip.style.display = 'none'; });
  }
  for (const head of document.querySelectorAll('th')) head.addEventListener('click', () => {
    const body = head.closest('table').tBodies[0], column = head.cellIndex, down = head.dataset.sorted === 'up';
    for (const other of head.parentNode.cells) delete other.dataset.sorted;
    head.dataset.sorted = down ? 'down' : 'up';
    const value = row => { const words = row.cells[column].textContent, size = parseFloat(words.replace(/,/g, ''));
      return [Number.isNaN(size) ? 1 : 0, size, words]; };
    const order = (a, b) => a[0] - b[0] || (a[0] ? a[2].localeCompare(b[2]) : a[1] - b[1]);
    const rows = [...body.rows].sort((a, b) => (down ? -1 : 1) * order(value(a), value(b)));
    for (const row of rows) body.append(row);
  });
})();
"""
