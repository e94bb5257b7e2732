// Answers written in Markdown, as elements. markdown-it (vendor/, MIT) reads them: a parser of CommonMark that lets no
// HTML of the text through and no address but http, https and mailto. Pictures are left out: nothing is loaded from
// elsewhere. The content-security-policy forbids scripts in the result in any case.

import markdownIt from "./vendor/markdown-it.js";

const reader = markdownIt({ html: false, linkify: false, breaks: true }).disable("image");
reader.validateLink = (address) => /^(https?:|mailto:)/i.test(address.trim());
reader.renderer.rules.link_open = (tokens, at, options, _, self) => {
  tokens[at].attrSet("target", "_blank");
  tokens[at].attrSet("rel", "noopener noreferrer nofollow");
  return self.renderToken(tokens, at, options);
};

const SIGNS = /^ {0,3}(```|~~~|#{1,6} |[-*+] |\d{1,9}[.)] |> |\|.*\|)|\*\*[^*\s]|`[^`\n]+`|\[[^\]\n]+\]\(/m;

// Return whether a text uses Markdown for anything.
export const isFormatted = (text) => SIGNS.test(text);

// Put a text into an element, formatted.
export function format(element, text) {
  element.innerHTML = reader.render(text);
}
