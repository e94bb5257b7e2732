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
export function adopt({ json_schema: schema, choices, ...defaults }) {
  const [json_schema, lines] = [schema == null ? "" : JSON.stringify(schema, null, 2), (choices ?? []).join("\n")];
  Object.assign(defaults, { json_schema, choices: lines });
  defaults.form = Object.keys(FORMS).find((kind) => defaults[kind]);
  for (const field of all()) {
    const value = field.dataset.from === "" ? null : defaults[field.dataset.from ?? field.name];
    if (value != null) field.dataset.default = value;
  }
  fill(remembered());
}

function apply() {
  for (const name of ["rule", "form"]) {
    for (const label of form.querySelectorAll(`.${name}`)) {
      label.hidden = label.control.disabled = !label.classList.contains(setting(name));
    }
  }
  check();
  fields.top_p.disabled = !setting("temperature");
  document.body.classList.toggle("marks", setting("marks"));
  document.body.classList.toggle("mono", setting("mono"));
}

// What an answer may have to match: the fields of a request for it, or a thrown line on what is wrong with the text.
const FORMS = {
  // A schema goes as it was written: keys of its objects keep their order, and integers their digits.
  json_schema(text) {
    let schema;
    try {
      schema = JSON.parse(text);
    } catch (error) {
      throw new Error(text.trim() ? `This is no JSON: ${error.message}` : "Write the schema as JSON.");
    }
    const is = typeof schema === "boolean" || (schema && typeof schema === "object" && !Array.isArray(schema));
    if (!is) throw new Error('A schema is an object, such as {"type": "integer"}.');
    return { guided_json: text };
  },
  regex(text) {
    if (!text) throw new Error("Write the expression, such as [0-9]{4}.");
    return { guided_regex: text };
  },
  choices(text) {
    const lines = text.split("\n").filter((line) => line.trim());
    if (!lines.length) throw new Error("Write one choice a line.");
    return { guided_choice: lines };
  },
};

// Say beside the field what is wrong with the text that an answer must match; the form is then not valid.
function check() {
  const kind = setting("form");
  let wrong = "";
  try {
    FORMS[kind]?.(setting(kind));
  } catch (error) {
    wrong = error.message;
  }
  fields[kind]?.setCustomValidity(wrong);
  document.getElementById("wrong").textContent = wrong;
}

// Return the field of a request that says what its answer must match, where that is not the server's own.
function match() {
  const kind = setting("form");
  if (!Object.keys(changed("form", ...(kind in FORMS ? [kind] : []))).length) return {};
  return FORMS[kind]?.(setting(kind)) ?? { response_format: { type: "text" } };
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
  return { ...changed(...names), ...match(), ...(Object.keys(decoding).length ? { decoding } : {}) };
}
