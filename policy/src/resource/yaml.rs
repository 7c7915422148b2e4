//! Block-style YAML of a JSON value.

use serde_json::Value;

const HEX: &[u8; 16] = b"0123456789ABCDEF";

/// The document, without `---`, with a line break at its end.
pub(super) fn write(value: &Value) -> String {
    let mut out = String::new();
    block(&mut out, value, 0);
    out
}

/// Writes `value` at the start of a line, or behind `- ` (then the first line is indented already).
fn block(out: &mut String, value: &Value, indent: usize) {
    match value {
        Value::Object(map) if !map.is_empty() => {
            for (index, (name, value)) in map.iter().enumerate() {
                if index > 0 {
                    spaces(out, indent);
                }
                scalar(out, name);
                out.push(':');
                below(out, value, indent);
            }
        }
        Value::Array(items) if !items.is_empty() => {
            for (index, item) in items.iter().enumerate() {
                if index > 0 {
                    spaces(out, indent);
                }
                out.push_str("- ");
                block(out, item, indent + 2);
            }
        }
        leaf => {
            inline(out, leaf);
            out.push('\n');
        }
    }
}

/// Writes the value of a field whose name is at `indent`: on the lines below it, or behind it.
fn below(out: &mut String, value: &Value, indent: usize) {
    let nested = match value {
        Value::Object(map) => !map.is_empty(),
        Value::Array(items) => !items.is_empty(),
        _ => false,
    };
    if nested {
        out.push('\n');
        spaces(out, indent + 2);
        block(out, value, indent + 2);
    } else {
        out.push(' ');
        block(out, value, indent + 2);
    }
}

fn inline(out: &mut String, value: &Value) {
    match value {
        Value::String(text) => scalar(out, text),
        // Empty lists and mappings, numbers, truth values and null are the same in YAML as in JSON.
        other => out.push_str(&other.to_string()),
    }
}

fn spaces(out: &mut String, count: usize) {
    out.extend(std::iter::repeat_n(' ', count));
}

/// Plain where no reader could take it for anything but this text, quoted otherwise.
fn scalar(out: &mut String, text: &str) {
    let starts_plain = text.starts_with(|c: char| c.is_ascii_alphabetic() || c == '/');
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '/' | '-' | '_');
    // Words that some YAML version reads as something else than text.
    let reserved = ["true", "false", "null", "yes", "no", "on", "off", "y", "n"];
    if starts_plain && text.chars().all(plain) && !reserved.contains(&text.to_ascii_lowercase().as_str()) {
        out.push_str(text);
        return;
    }
    out.push('"');
    for c in text.chars() {
        match c {
            '"' | '\\' => out.extend(['\\', c]),
            ' '..='~' => out.push(c),
            c if c.is_alphanumeric() => out.push(c),
            c => {
                out.push_str("\\U");
                out.extend((0..8).rev().map(|digit| char::from(HEX[(u32::from(c) >> (4 * digit) & 0xF) as usize])));
            }
        }
    }
    out.push('"');
}
