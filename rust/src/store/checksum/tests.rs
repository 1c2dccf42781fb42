use super::*;

fn binding() -> Binding {
    Binding { store: [7; 16], chunk: 3, group: Group::Weight, generation: 9 }
}

#[test]
fn crc32c_is_the_published_one() {
    assert_eq!(crc32c(b"123456789"), 0xe306_9283);
    assert_eq!(crc64(b"123456789"), 0xae8b_1486_0a79_9888);
}

#[test]
fn pieces_of_any_size_give_the_same_sums() {
    let data: Vec<u8> = (0..=250).cycle().take(2 * UNIT_BYTES + 4096).collect();
    let expected = sums(&binding(), &data);
    for piece in [4096, 10_000, UNIT_BYTES, 3 * UNIT_BYTES] {
        let mut running = Running::new(&binding(), 0);
        data.chunks(piece).for_each(|bytes| running.update(bytes));
        assert_eq!(running.finish(), expected, "pieces of {piece}");
    }
    let mut running = Running::new(&binding(), 1);
    running.update(&data[UNIT_BYTES..]);
    assert_eq!(running.finish(), expected[1..]);
}

#[test]
fn a_flipped_bit_names_its_unit() {
    let mut data = vec![1_u8; 2 * UNIT_BYTES + 4096];
    let expected = sums(&binding(), &data);
    assert_eq!(expected.len(), 3);
    assert_eq!(verify(&binding(), &data, &expected), Ok(()));
    data[UNIT_BYTES + 17] ^= 4;
    let mismatch = verify(&binding(), &data, &expected).expect_err("one bit was flipped");
    assert_eq!((mismatch.unit, mismatch.expected), (1, expected[1]));
    assert_eq!(verify_on_this_thread(&binding(), &data, &expected), Err(mismatch));
    assert_eq!(sums_on_this_thread(&binding(), &data), sums(&binding(), &data));
}

#[test]
fn the_same_bytes_elsewhere_or_at_another_time_do_not_pass() {
    let data = vec![1_u8; 4096];
    let expected = sums(&binding(), &data);
    let others = [
        Binding { store: [8; 16], ..binding() },
        Binding { chunk: 4, ..binding() },
        Binding { group: Group::Update, ..binding() },
        Binding { generation: 8, ..binding() },
    ];
    for other in others {
        assert!(verify(&other, &data, &expected).is_err(), "{other:?}");
    }
    let two_units = vec![1_u8; 2 * UNIT_BYTES];
    let swapped = sums(&binding(), &two_units);
    assert_ne!(swapped[0], swapped[1], "equal units at other places differ");
}
