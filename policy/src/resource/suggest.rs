//! "Did you mean": the nearest of a few known words.

/// Longer texts are no misspellings of our words, and the distance costs their product.
const MAX_LENGTH: usize = 48;

/// The known word that `text` was probably meant to be.
pub(super) fn nearest<'a>(text: &str, known: &[&'a str]) -> Option<&'a str> {
    let typed: Vec<char> = text.chars().take(MAX_LENGTH + 1).flat_map(char::to_lowercase).collect();
    if typed.len() > MAX_LENGTH {
        return None;
    }
    known
        .iter()
        .map(|&word| {
            let letters: Vec<char> = word.chars().flat_map(char::to_lowercase).collect();
            (distance(&typed, &letters), letters.len(), word)
        })
        // One slip in a short word, and one more for every three letters.
        .filter(|&(distance, length, _)| distance <= 1 + length / 4)
        .min_by_key(|&(distance, ..)| distance)
        .map(|(.., word)| word)
}

/// `unknown field `prot`, did you mean `port`?`, or what there is to choose from.
pub(super) fn unknown(what: &str, text: &str, known: &[&str]) -> String {
    let shown = super::tree::excerpt(text);
    if let Some(word) = nearest(text, known) {
        return format!("unknown {what} `{shown}`, did you mean `{word}`?");
    }
    let choices: Vec<String> = known.iter().map(|word| format!("`{word}`")).collect();
    match choices.split_last() {
        Some((last, rest)) if !rest.is_empty() => {
            format!("unknown {what} `{shown}`: it must be {} or {last}", rest.join(", "))
        }
        _ => format!("unknown {what} `{shown}`: it must be {}", choices.concat()),
    }
}

/// Insertions, deletions, substitutions and swaps of neighbours (optimal string alignment).
fn distance(a: &[char], b: &[char]) -> usize {
    let mut before_last: Vec<usize> = Vec::new();
    let mut last: Vec<usize> = (0..=b.len()).collect();
    for i in 1..=a.len() {
        let mut row = vec![i; b.len() + 1];
        for j in 1..=b.len() {
            let substituted = last[j - 1] + usize::from(a[i - 1] != b[j - 1]);
            row[j] = substituted.min(last[j] + 1).min(row[j - 1] + 1);
            if i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] {
                row[j] = row[j].min(before_last[j - 2] + 1);
            }
        }
        before_last = std::mem::replace(&mut last, row);
    }
    last[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slips_are_recognized() {
        let known = ["port", "name", "protocol", "tunnelPort"];
        for (typed, meant) in [("prot", "port"), ("Port", "port"), ("nmae", "name"), ("tunnel_port", "tunnelPort")] {
            assert_eq!(nearest(typed, &known), Some(meant), "{typed}");
        }
        for typed in ["", "zzzz", "workloads", &"port".repeat(100)] {
            assert_eq!(nearest(typed, &known), None, "{typed}");
        }
    }

    #[test]
    fn messages_name_the_choices() {
        assert_eq!(unknown("field", "prot", &["port", "name"]), "unknown field `prot`, did you mean `port`?");
        assert_eq!(
            unknown("action", "perhaps", &["allow", "deny"]),
            "unknown action `perhaps`: it must be `allow` or `deny`"
        );
    }
}
