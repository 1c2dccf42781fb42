use super::*;
use crate::optimizer::adamw::tests::ADAMW;

#[test]
fn every_trained_format_has_an_update_and_no_other_has() {
    for format in StateFormat::ALL {
        match Hyperparameters::AdamW(ADAMW).over(format, 8, 1.0, &[]) {
            Ok(update) => assert_eq!((update.format(), format.is_trainable()), (format, true)),
            Err(error) => {
                assert!(!format.is_trainable());
                assert!(error.to_string().contains(format.spec().name), "{error}");
            }
        }
    }
}
