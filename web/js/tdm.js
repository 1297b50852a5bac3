// What TDM's nodes say: the text of `ui.PreviewText` on a node's face, and warnings as toasts. What one of core's nodes
// could not do with a model of TDM's is written on its face, too. And the templates are sorted.
import { app } from "../../../scripts/app.js";
import { ComfyWidgets } from "../../../scripts/widgets.js";

const SPEAKING = ["TDMLoadStudent", "TDMLoadDiffusers", "TDMSigmas", "TDMCompare"];
const REPORT = "tdm_report";
const WARNING = "tdm.warning";
const FACE = "tdm.face";
const FIRST_TEMPLATE = "tdm-first-picture";

function show(node, text) {
  let widget = node.widgets?.find((each) => each.name === REPORT);
  if (!widget) {
    widget = ComfyWidgets.STRING(node, REPORT, ["STRING", { multiline: true }], app).widget;
    widget.label = " ";
    widget.serialize = false; // not in a saved workflow ...
    widget.options.serialize = false; // ... nor in the prompt
    widget.options.read_only = true;
    widget.options.getMinHeight = () => 80;
    if (widget.element) widget.element.readOnly = true;
    if (widget.inputEl) widget.inputEl.readOnly = true;
  }
  widget.value = text;
  const [width, height] = node.computeSize();
  node.setSize([Math.max(node.size[0], width), Math.max(node.size[1], height)]);
  node.setDirtyCanvas?.(true, true);
}

function clear(node) {
  const widget = node.widgets?.find((each) => each.name === REPORT);
  if (!widget) return;
  widget.onRemove?.();
  node.widgets.splice(node.widgets.indexOf(widget), 1);
  node.setSize([node.size[0], node.computeSize()[1]]);
  node.setDirtyCanvas?.(true, true);
}

// A node by the id that the server has for it: "12:5" is node 5 of the subgraph 12.
function nodeOf(id) {
  let graph = app.rootGraph ?? app.graph;
  let node;
  for (const part of id.split(":")) {
    node = graph?.getNodeById(part) ?? graph?.getNodeById(Number(part));
    graph = node?.subgraph;
  }
  return node;
}

const faces = new Map(); // text by the server's id

function writeOnFace({ detail }) {
  if (detail.text) faces.set(detail.node, detail.text);
  else faces.delete(detail.node);
  const shown = (id) => id.split(".")[0]; // "7.0.0.1" runs in the place of node 7, as those of TDM Generate do
  const texts = [...faces].filter(([id]) => shown(id) === shown(detail.node)).map(([, text]) => text);
  const node = nodeOf(shown(detail.node));
  if (node && texts.length) show(node, texts.join("\n"));
  else if (node) clear(node);
}

// The server lists a pack's templates as its file system does.
function sortTemplates() {
  const get = app.api.getWorkflowTemplates.bind(app.api);
  app.api.getWorkflowTemplates = async () => {
    const packs = await get();
    for (const names of Object.values(packs)) {
      if (!names.includes?.(FIRST_TEMPLATE)) continue;
      names.sort((a, b) => (b === FIRST_TEMPLATE) - (a === FIRST_TEMPLATE) || a.localeCompare(b));
    }
    return packs;
  };
}

app.registerExtension({
  name: "tdmfewstepstudents.report",
  init: sortTemplates,
  setup() {
    app.api.addEventListener(FACE, writeOnFace);
    app.api.addEventListener(WARNING, ({ detail }) =>
      app.extensionManager.toast.add({ severity: "warn", summary: "TDM", detail: detail.text, life: 15000 }),
    );
  },
  beforeRegisterNodeDef(nodeType, { name }) {
    if (!SPEAKING.includes(name)) return;
    const onExecuted = nodeType.prototype.onExecuted;
    nodeType.prototype.onExecuted = function (message) {
      onExecuted?.apply(this, arguments);
      if (message?.text) show(this, [message.text].flat().join("\n"));
    };
  },
});
