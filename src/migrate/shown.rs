//! Text of a peer that a person will see, on a terminal or in a log: one line, without control characters (a terminal would obey them,
//! a log would have lines that nobody wrote), and not endless. For serde's `deserialize_with`.

use serde::{Deserialize, Deserializer};

/// The most bytes of it that are kept.
const MOST: usize = 4 << 10;

/// The text as it may be shown.
pub fn clean(text: &str) -> String {
    let mut clean = String::new();
    for c in text.chars() {
        if clean.len() >= MOST {
            clean.push('…');
            break;
        }
        clean.push(match c {
            '\n' | '\r' | '\t' => ' ',
            // what turns the direction of writing is a way of hiding text too
            c if c.is_control() || matches!(c, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}') => {
                '\u{fffd}'
            }
            c => c,
        });
    }
    clean
}

/// One text.
pub fn line<'de, D: Deserializer<'de>>(from: D) -> Result<String, D::Error> {
    Ok(clean(&String::deserialize(from)?))
}

/// Several.
pub fn lines<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<String>, D::Error> {
    Ok(Vec::<String>::deserialize(from)?.iter().map(|text| clean(text)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{agent::message::Message, migrate::protocol::Failure};

    #[test]
    fn what_a_peer_says_is_one_harmless_line() {
        assert_eq!(clean("no room: ü\n\tx"), "no room: ü  x");
        assert_eq!(clean("\u{1b}[2Jfine\u{202e}"), "\u{fffd}[2Jfine\u{fffd}");
        assert!(clean(&"é".repeat(1 << 20)).len() < MOST + 8);
        let said = r#"{"phase":"dump","message":"bad\n\u001b]0;x\u0007"}"#;
        let failure: Failure = serde_json::from_str(said).unwrap();
        assert_eq!(failure.message, "bad \u{fffd}]0;x\u{fffd}");
        for said in [
            r#"{"says":"refused","code":"a\n","message":"b\n","advice":"c\n"}"#,
            r#"{"says":"cancel","reason":"\n"}"#,
            r#"{"says":"warning","message":"\n"}"#,
            r#"{"says":"progress","what":"\n","done":1,"total":1}"#,
            r#"{"says":"started","warnings":["\n"]}"#,
            r#"{"says":"ready","migration":"\n","stdio":"\n"}"#,
            r#"{"says":"failed","failure":{"phase":"\n","message":"\n"},"left":["\n"]}"#,
        ] {
            let message: Message = serde_json::from_str(said).unwrap();
            assert!(!format!("{message:?}").contains("\\n"), "{message:?}");
            assert!(!serde_json::to_string(&message).unwrap().contains("\\n"), "{said}");
        }
    }
}
