//! Durations, instants and foreign text for people.

use std::time::Duration;

use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

/// Text from elsewhere with control characters and direction overrides made visible, so that it cannot drive the
/// terminal or look like something else.
pub(crate) fn printable(text: &str) -> String {
    let mut result = String::with_capacity(text.len());
    for character in text.chars() {
        let invisible =
            matches!(character, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
        if character.is_control() || invisible {
            result.extend(character.escape_default());
        } else {
            result.push(character);
        }
    }
    result
}

/// At most `limit` characters of it, and a sign where it was cut.
pub(crate) fn shortened(text: &str, limit: usize) -> String {
    let mut characters = text.chars();
    let mut result: String = characters.by_ref().take(limit).collect();
    if characters.next().is_some() {
        result.push('…');
    }
    result
}

/// `0.3 s`, `42 s`, `5 m 10 s`, `3 h 20 m`, `12 d 4 h`.
pub(crate) fn duration(duration: Duration) -> String {
    let seconds = duration.as_secs();
    match seconds {
        0..10 => format!("{:.1} s", duration.as_secs_f64()),
        10..60 => format!("{seconds} s"),
        60..3600 => format!("{} m {} s", seconds / 60, seconds % 60),
        3600..86_400 => format!("{} h {} m", seconds / 3600, seconds % 3600 / 60),
        _ => format!("{} d {} h", seconds / 86_400, seconds % 86_400 / 3600),
    }
}

/// An RFC 3339 instant.
pub(crate) fn instant(text: &str) -> Option<OffsetDateTime> {
    OffsetDateTime::parse(text, &Rfc3339).ok()
}

/// `900`, `90s`, `15m`, `8h`, `30d`, `250ms`.
pub(crate) fn parse_duration(text: &str) -> Result<Duration, String> {
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at(digits);
    let expected = || format!("'{text}' is no duration: write a number and ms, s, m, h or d, for example 15m");
    let number: u64 = number.parse().map_err(|_| expected())?;
    let milliseconds = match unit {
        "ms" => 1,
        "" | "s" => 1000,
        "m" => 60_000,
        "h" => 3_600_000,
        "d" => 86_400_000,
        _ => return Err(expected()),
    };
    number.checked_mul(milliseconds).map(Duration::from_millis).ok_or_else(expected)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_read_and_print() {
        for (text, milliseconds) in
            [("900", 900_000), ("250ms", 250), ("15m", 900_000), ("8h", 28_800_000), ("1d", 86_400_000), ("0s", 0)]
        {
            assert_eq!(parse_duration(text), Ok(Duration::from_millis(milliseconds)), "{text}");
        }
        for text in ["", "m", "-1s", "1.5h", "1y", "99999999999999999d", "15 m"] {
            let message = parse_duration(text).expect_err(text);
            assert!(message.contains("for example 15m"), "{message}");
        }
        for (milliseconds, text) in [
            (300, "0.3 s"),
            (42_000, "42 s"),
            (310_000, "5 m 10 s"),
            (12_000_000, "3 h 20 m"),
            (1_051_200_000, "12 d 4 h"),
        ] {
            assert_eq!(duration(Duration::from_millis(milliseconds)), text);
        }
    }

    #[test]
    fn direction_overrides_are_visible() {
        assert_eq!(printable("a\u{202e}b\tc"), "a\\u{202e}b\\tc");
        assert_eq!(printable("Grüße ✓"), "Grüße ✓", "ordinary text stays");
        assert_eq!(shortened("abcdef", 3), "abc…");
        assert_eq!(shortened("abc", 3), "abc");
    }
}
