use super::*;

/// What is written into manifests, and how many bytes follow from it, is the file format.
#[test]
fn a_row_has_the_name_that_files_have_and_the_bytes_that_lie_in_them() {
    let bytes = [("bf16", 2, 10), ("f32", 4, 8), ("raw8", 1, 0), ("raw16", 2, 0), ("raw32", 4, 0)];
    for (format, (name, weight, update)) in StateFormat::ALL.into_iter().zip(bytes) {
        assert_eq!(serde_json::to_value(format).expect("JSON"), name);
        assert_eq!(format.spec().name, name);
        assert_eq!(Group::ALL.map(|group| format.group_bytes(group)), [weight, update], "{name}");
        assert_eq!(format.is_trainable(), update > 0, "{name}");
        let remainder =
            format.planes(Group::Update).iter().position(|p| p.plane == Plane::Remainder);
        assert_eq!(remainder, (format == StateFormat::Bf16).then_some(0), "{name}");
    }
}
