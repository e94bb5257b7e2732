// The settings form: its values, which of them differ from the server's, are remembered and are sent.

const form = document.getElementById("fields");
const KEPT = "illada.settings";
export const fields = form.elements;

const all = () => [...fields].filter((field) => field.name);
function read(field, text) {
  if (field.type === "checkbox") return Boolean(text);
  if (field.type === "number") return text === "" ? null : Number(text);
  return text;
}

const defaultOf = (field) => read(field, field.dataset.default);

export function setting(name) {
  const field = fields[name];
  return field.type === "checkbox" ? field.checked : (read(field, field.value) ?? defaultOf(field));
}

// Return those of the named settings that differ from the defaults.
function changed(...names) {
  const differ = names.filter((name) => setting(name) !== defaultOf(fields[name]));
  return Object.fromEntries(differ.map((name) => [name, setting(name)]));
}

// Put values into the form, and the default where a value is missing.
export function fill(values) {
  for (const field of all()) {
    const value = values[field.name] ?? defaultOf(field);
    if (field.type === "checkbox") field.checked = value;
    else field.value = value;
  }
  apply();
}

export function remembered() {
  try {
    return JSON.parse(localStorage.getItem(KEPT)) ?? {};
  } catch {
    return {};
  }
}

export function remember() {
  apply();
  localStorage.setItem(KEPT, JSON.stringify(changed(...all().map((field) => field.name))));
}

// Make the server's settings the defaults.
export function adopt(defaults) {
  for (const field of all()) {
    const value = field.dataset.from === "" ? null : defaults[field.dataset.from ?? field.name];
    if (value != null) field.dataset.default = value;
  }
  fill(remembered());
}

function apply() {
  const rule = setting("rule");
  for (const label of form.querySelectorAll(".rule")) {
    label.hidden = label.control.disabled = !label.classList.contains(rule);
  }
  fields.top_p.disabled = !setting("temperature");
  document.body.classList.toggle("marks", setting("marks"));
  document.body.classList.toggle("mono", setting("mono"));
}

// Return the fields of a request that the settings ask for; fields that equal the server's own are left out.
export function wanted() {
  const rule = setting("rule");
  let decoding = changed("block_length");
  if (rule === "fast") decoding = "fast";
  else if (rule !== "server") {
    // As many passes as a block has tokens, so each pass keeps one token.
    const exact = { steps_per_block: setting("block_length"), cache: "none" };
    const chosen = rule === "exact" ? exact : { [rule]: setting(rule), cache: setting("cache") };
    decoding = { ...decoding, ...chosen, speculate: setting("speculate") };
  }
  const names = ["max_tokens", "temperature", "seed", ...(setting("temperature") ? ["top_p"] : [])];
  return { ...changed(...names), ...(Object.keys(decoding).length ? { decoding } : {}) };
}
