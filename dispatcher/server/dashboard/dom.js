// The page's parts, changed in place: what did not change is not touched, so that nothing
// flickers and neither a selection nor the focus is lost. Text is only ever text.

export const byId = (id) => document.getElementById(id);

export function make(tag, options = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(options)) {
    if (name === "text") node.textContent = value;
    else if (name === "class") node.className = value;
    else node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}

export function setText(node, text) {
  const first = node.firstChild;
  if (first && first.nodeType === Node.TEXT_NODE && !first.nextSibling) {
    if (first.data !== text) first.data = text;
  } else if (node.textContent !== text || node.firstElementChild) {
    node.textContent = text;
  }
}

export function setAttribute(node, name, value) {
  if (node.getAttribute(name) !== value) node.setAttribute(name, value);
}

export function setClass(node, name) {
  if (node.className !== name) node.className = name;
}

export function show(node, isShown) {
  if (node.hidden === isShown) node.hidden = !isShown;
}

// Lets the children of `parent` be one for each entry, in their order. Those of entries that
// were there before stay, and are only moved when their order changed.
export class Rows {
  constructor(parent, keyOf, build, update) {
    this.parent = parent;
    this.keyOf = keyOf;
    this.build = build;
    this.update = update;
    this.rows = new Map();
  }

  set(entries) {
    const gone = new Map(this.rows);
    const kept = [];
    for (const entry of entries) {
      const key = this.keyOf(entry);
      let row = this.rows.get(key);
      if (!row) {
        row = this.build(entry);
        this.rows.set(key, row);
      }
      gone.delete(key);
      this.update(row, entry);
      kept.push(row.node);
    }
    for (const [key, row] of gone) {
      row.node.remove();
      this.rows.delete(key);
    }
    let next = this.parent.firstChild;
    for (const node of kept) {
      if (node === next) next = node.nextSibling;
      else this.parent.insertBefore(node, next);
    }
  }
}

// A table's row of as many cells; `classes` names what each is.
export function tableRow(classes, head = 0) {
  const cells = classes.map((name, place) => {
    const options = place === head ? { scope: "row" } : {};
    if (name) options.class = name;
    return make(place === head ? "th" : "td", options);
  });
  return { node: make("tr", {}, ...cells), cells };
}
