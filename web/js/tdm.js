// What TDM's nodes say: the text of `ui.PreviewText` on a node's face, and warnings as toasts. And its templates sorted.
import { app } from "../../../scripts/app.js";
import { ComfyWidgets } from "../../../scripts/widgets.js";

const SPEAKING = ["TDMLoadStudent", "TDMLoadDiffusers", "TDMSigmas", "TDMCompare"];
const REPORT = "tdm_report";
const WARNING = "tdm.warning";
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
