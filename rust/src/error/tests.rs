use super::*;

#[test]
fn every_message_names_its_place_or_cause() {
    for error in Error::examples() {
        let text = error.to_string();
        assert!(text.len() > 15, "{text}");
        assert!(!text.contains("{"), "an unfilled placeholder: {text}");
    }
}
