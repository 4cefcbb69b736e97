// Load Style: the saved styles as pictures below the list of their names. Without this file the
// list alone does the same. Pictures and tags come from the files' headers, by ComfyUI's own route.

import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";

const NODE = "StyleMasterLoadStyle";
const FOLDER = "stylemaster_styles";
const HEIGHT = 150;
// Anybody may have written the file: nothing but a small picture that it holds itself.
const PICTURE = /^data:image\/jpeg;base64,[A-Za-z0-9+/]{1,40000}={0,2}$/;

const CSS = `
.stylemaster-library { display: flex; flex-direction: column; gap: 4px; box-sizing: border-box;
  height: 100%; min-height: 0; overflow: hidden; font: 11px sans-serif; color: var(--fg-color, #ddd); }
.stylemaster-library input { flex: none; padding: 3px 6px; border: 1px solid var(--border-color, #555);
  border-radius: 4px; background: var(--comfy-input-bg, #222); color: inherit; font: inherit; }
.stylemaster-library div { flex: 1; min-height: 0; overflow-y: auto; display: grid; gap: 4px;
  grid-template-columns: repeat(auto-fill, minmax(72px, 1fr)); align-content: start; }
.stylemaster-library button { display: block; padding: 2px; border: 2px solid transparent; min-width: 0;
  border-radius: 4px; background: var(--comfy-input-bg, #222); color: inherit; font: inherit; cursor: pointer; }
.stylemaster-library button[aria-pressed="true"] { border-color: var(--p-primary-color, #6af); }
.stylemaster-library img { display: block; width: 100%; height: 64px; object-fit: cover; border-radius: 2px;
  background: linear-gradient(135deg, #444, #777); }
.stylemaster-library span { display: block; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }`;
const BLANK = "data:image/gif;base64,R0lGODlhAQABAAAAACH5BAEKAAEALAAAAAABAAEAAAICTAEAOw==";

const cards = new Map(); // by name of the file: a promise of { picture, tags }

function cardOf(name) {
  if (!cards.has(name)) cards.set(name, readCard(name));
  return cards.get(name);
}

async function readCard(name) {
  const none = { picture: null, tags: "" };
  try {
    const answer = await api.fetchApi(`/view_metadata/${FOLDER}?filename=${encodeURIComponent(name)}`);
    if (!answer.ok) return none;
    const header = await answer.json();
    const picture = header["modelspec.thumbnail"] ?? "";
    const tags = String(header["modelspec.tags"] ?? "").slice(0, 1200);
    return { picture: PICTURE.test(picture) ? picture : null, tags };
  } catch (error) {
    console.warn(`StyleMaster: the picture of ${name} cannot be read`, error);
    return none;
  }
}

class StyleLibrary {
  constructor(node, list) {
    this.node = node;
    this.list = list;
    this.element = document.createElement("div");
    this.element.className = "stylemaster-library";
    this.filter = document.createElement("input");
    this.filter.placeholder = "name or tag";
    this.filter.addEventListener("input", () => this.applyFilter());
    this.filter.addEventListener("keydown", (event) => event.stopPropagation());
    this.grid = document.createElement("div");
    this.grid.addEventListener("wheel", (event) => event.stopPropagation(), { passive: true });
    this.element.append(this.filter, this.grid);
    this.seen = new IntersectionObserver((entries) => {
      for (const entry of entries) if (entry.isIntersecting) this.showCard(entry.target);
    });
    const before = list.callback;
    list.callback = (...given) => {
      const result = before?.apply(list, given);
      this.mark();
      return result;
    };
    this.fill();
  }

  names() {
    const values = this.list.options?.values ?? [];
    return (typeof values === "function" ? values(this.list, this.node) : values).map(String);
  }

  fill() {
    this.seen.disconnect();
    this.grid.replaceChildren(...this.names().map((name) => this.button(name)));
    for (const button of this.grid.children) this.seen.observe(button);
    this.mark();
    this.applyFilter();
  }

  button(name) {
    const button = document.createElement("button");
    const image = document.createElement("img");
    const label = document.createElement("span");
    button.type = "button";
    button.dataset.name = name;
    button.title = name;
    image.src = BLANK;
    image.alt = "";
    label.textContent = name.replace(/\.safetensors$/, "");
    button.append(image, label);
    button.addEventListener("click", () => this.choose(name));
    return button;
  }

  async showCard(button) {
    this.seen.unobserve(button);
    const { picture, tags } = await cardOf(button.dataset.name);
    if (picture) button.querySelector("img").src = picture;
    if (tags) button.title = `${button.dataset.name}\n${tags}`;
  }

  choose(name) {
    this.list.value = name;
    this.list.callback?.(name, app.canvas, this.node);
    this.mark();
    this.node.graph?.setDirtyCanvas?.(true, true);
  }

  mark() {
    for (const button of this.grid.children)
      button.setAttribute("aria-pressed", String(button.dataset.name === this.list.value));
  }

  async applyFilter() {
    const wanted = this.filter.value.trim().toLowerCase();
    for (const button of this.grid.children) {
      const name = button.dataset.name;
      const text = wanted && `${name},${(await cardOf(name)).tags}`.toLowerCase();
      if (wanted !== this.filter.value.trim().toLowerCase()) return; // typed on meanwhile
      button.hidden = Boolean(wanted) && !text.includes(wanted);
      button.style.display = button.hidden ? "none" : "";
    }
  }
}

function addLibrary(node) {
  const list = node.widgets?.find((widget) => widget.name === "style_name");
  if (!list || typeof node.addDOMWidget !== "function") return;
  const library = new StyleLibrary(node, list);
  const widget = node.addDOMWidget("pictures", "stylemaster_library", library.element, {
    serialize: false,
    hideOnZoom: false,
    getMinHeight: () => HEIGHT,
    getMaxHeight: () => 600,
  });
  widget.serialize = false; // the list alone is saved and sent
  node.stylemasterLibrary = library;
}

app.registerExtension({
  name: "stylemaster.StyleLibrary",
  setup() {
    const style = document.createElement("style");
    style.textContent = CSS;
    document.head.append(style);
  },
  nodeCreated(node) {
    if (node.comfyClass === NODE) addLibrary(node);
  },
  loadedGraphNode(node) {
    node.stylemasterLibrary?.mark();
  },
  refreshComboInNodes() {
    cards.clear();
    const visit = (graph) => {
      for (const node of graph?._nodes ?? []) {
        node.stylemasterLibrary?.fill();
        if (node.subgraph) visit(node.subgraph);
      }
    };
    visit(app.rootGraph ?? app.graph);
  },
});
