use super::*;

#[test]
fn names_are_read_back() {
    for kv_type in KvType::ALL {
        assert_eq!(kv_type.to_string().parse::<KvType>().unwrap(), kv_type);
    }
    let error = "f8".parse::<KvType>().unwrap_err().to_string();
    assert_eq!(error, "option `kv_type`: `f8` is none; there are f32, f16, q8_0");
}

#[test]
fn bytes_are_foretold() {
    for kv_type in KvType::ALL {
        for (kv_heads, head_dim, capacity) in [(1, 1, 1), (2, 20, 63), (3, 80, 64), (8, 128, 1000), (1, 512, 65)] {
            let kv = LayerKv::new(kv_type, kv_heads, head_dim, capacity);
            assert_eq!(kv.bytes(), LayerKv::bytes_for(kv_type, kv_heads, head_dim, capacity));
            assert_eq!(kv.capacity(), capacity);
        }
    }
    let per_position = KvType::ALL.map(|kv_type| kv_type.bytes_per_position(8, 128));
    assert_eq!(per_position, [2 * 8 * 128 * 4, 2 * 8 * 128 * 2, 2 * 8 * 128 / 32 * 34]);
}

#[test]
#[should_panic(expected = "position 65 is past the KV cache's 64")]
fn nothing_is_written_past_the_capacity() {
    let mut kv = LayerKv::new(KvType::F16, 1, 4, 64);
    let rows = Strided { values: &[0.0; 12], stride: 4 };
    kv.append(Isa::SCALAR, 62, 3, rows, rows);
}

#[test]
#[should_panic(expected = "keys or values are not 3 rows of 4")]
fn nothing_is_read_past_the_rows() {
    let mut kv = LayerKv::new(KvType::F16, 1, 4, 64);
    let rows = Strided { values: &[0.0; 12], stride: 5 };
    kv.append(Isa::SCALAR, 0, 3, rows, rows);
}

#[test]
fn sizes_beyond_u64_are_the_greatest() {
    for kv_type in KvType::ALL {
        assert_eq!(kv_type.bytes_per_position(usize::MAX, usize::MAX), u64::MAX);
        assert_eq!(kv_type.bytes_per_position(1 << 32, 1 << 31), u64::MAX, "{kv_type}");
        assert_eq!(LayerKv::bytes_for(kv_type, 1 << 20, 128, 1 << 40), u64::MAX);
        assert_eq!(LayerKv::bytes_for(kv_type, 1, 1, usize::MAX), u64::MAX);
    }
}

/// What a safe call panics with.
fn refusal(call: impl FnOnce()) -> String {
    let panic = std::panic::catch_unwind(std::panic::AssertUnwindSafe(call)).expect_err("it was taken");
    panic.downcast_ref::<String>().expect("a message with sizes").clone()
}

#[test]
fn a_cache_that_no_memory_has_is_refused_with_its_sizes() {
    for kv_type in KvType::ALL {
        // Each would be a small allocation if the product wrapped: 2^64 bytes and more.
        for (kv_heads, capacity) in [(1 << 58, 64), (1, usize::MAX), (1 << 32, 1 << 32), (0, usize::MAX)] {
            let message = refusal(|| {
                LayerKv::new(kv_type, kv_heads, 64, capacity);
            });
            assert!(message.contains("multiplied is more than memory can have"), "{message}");
        }
    }
    assert_eq!(LayerKv::new(KvType::F16, 1 << 40, 64, 0).bytes(), 0);
}

#[test]
fn positions_and_rows_that_wrap_are_refused() {
    let mut kv = LayerKv::new(KvType::F32, 1, 4, 64);
    let values = [0.0; 8];
    let rows = |stride| Strided { values: &values, stride };
    let message = refusal(|| kv.append(Isa::SCALAR, usize::MAX, 2, rows(4), rows(4)));
    assert!(message.contains("positions to write: 2 from 18446744073709551615 on"), "{message}");
    // Two strides are 2^64, and two rows and a half are as long as no row.
    for (count, stride) in [(3, 1 << 63), (2, usize::MAX - 3), (2, usize::MAX), (5, 1 << 62)] {
        assert!(!rows(stride).has(count, 4), "{count} rows, {stride} apart");
        let message = refusal(|| kv.append(Isa::SCALAR, 0, count, rows(stride), rows(4)));
        assert!(message.contains("keys or values are not"), "{message}");
    }
    assert!(rows(4).has(2, 4) && rows(usize::MAX).has(1, 8) && rows(0).has(0, usize::MAX));
}

#[test]
fn the_same_bytes_on_every_instruction_set_by_rows_and_by_heads() {
    for kv_type in KvType::ALL {
        for (kv_heads, head_dim) in [(1, 1), (2, 20), (3, 80), (2, 128)] {
            let (rows, width) = (70, kv_heads * head_dim);
            let values: Vec<f32> =
                (0..rows * width).map(|i| ((i * 7919 + 13) % 20_011) as f32 / 10_005.5 - 1.0).collect();
            let values = Strided { values: &values, stride: width };
            let mut expected = LayerKv::new(kv_type, kv_heads, head_dim, rows);
            expected.append(Isa::SCALAR, 0, rows, values, values);
            for isa in Isa::available() {
                let mut kv = LayerKv::new(kv_type, kv_heads, head_dim, rows);
                let writer = kv.writer();
                for head in (0..kv_heads).rev() {
                    for row in (0..rows).rev() {
                        let values = Strided { values: &values.values[row * width..], stride: width };
                        // SAFETY: one after the other.
                        unsafe { writer.append(isa, head, row, 1, values, values) }
                    }
                }
                assert!(kv.data.as_slice() == expected.data.as_slice(), "{kv_type} {isa} {kv_heads} x {head_dim}");
            }
        }
    }
}
