use proptest::prelude::*;

use super::*;

/// Body sizes and descriptors of each request, written down a second time from the tables of the specification.
fn shape(code: Code) -> (Vec<usize>, usize) {
    let (size, fds) = match code {
        Code::GetFeatures
        | Code::SetOwner
        | Code::ResetOwner
        | Code::GetProtocolFeatures
        | Code::GetQueueNum
        | Code::ResetDevice
        | Code::GetMaxMemSlots
        | Code::GetStatus => (0, 0),
        Code::SetFeatures | Code::SetProtocolFeatures | Code::SetStatus => (8, 0),
        Code::SetVringNum | Code::SetVringBase | Code::GetVringBase | Code::SetVringEnable => {
            (8, 0)
        }
        Code::SetVringKick | Code::SetVringCall | Code::SetVringErr => (8, 1),
        Code::SetVringAddr => (40, 0),
        Code::SetLogBase => (16, 1),
        Code::SetLogFd | Code::SetBackendReqFd => (0, 1),
        Code::AddMemReg => (40, 1),
        Code::RemMemReg => (40, 0),
        // Of zeroes: no regions, a configuration of no bytes.
        Code::SetMemTable => (8, 0),
        Code::GetConfig | Code::SetConfig => (12, 0),
        Code::GetInflightFd => return (vec![20, 24], 0),
        Code::SetInflightFd => return (vec![20, 24], 1),
    };
    (vec![size], fds)
}

#[test]
fn s5_f1_f2_body_and_descriptors_must_be_those_of_the_request() {
    for &code in Code::ALL {
        let (sizes, due) = shape(code);
        for size in 0..300 {
            for found in 0..4 {
                let fds: Vec<usize> = (0..found).collect();
                let parsed = Request::parse(code, &vec![0; size], fds);
                let any = code == Code::RemMemReg;
                let good = sizes.contains(&size) && (found == due || any);
                assert_eq!(parsed.is_ok(), good, "{code:?} {size} {found}: {parsed:?}");
            }
        }
    }
}

#[test]
fn s8_numbers_that_are_no_request_are_none() {
    for number in (0..1000).chain([u32::MAX, 1 << 31]) {
        if let Some(code) = Code::of(number) {
            assert_eq!(code as u32, number);
        }
    }
    assert_eq!(Code::of(0), None);
    assert_eq!(Code::of(41), None);
}

#[test]
fn f4_f5_word_of_a_ring_descriptor_has_an_index_and_one_flag() {
    for code in [Code::SetVringKick, Code::SetVringCall, Code::SetVringErr] {
        for bit in 0..64 {
            for fds in [vec![], vec![7]] {
                let word = 3u64 | 1 << bit;
                let with_fd = fds.len() == 1;
                let parsed = Request::parse(code, &word.to_ne_bytes(), fds);
                let good = match bit {
                    0..8 => with_fd,
                    8 => !with_fd,
                    _ => false,
                };
                assert_eq!(parsed.is_ok(), good, "{code:?} {bit}");
            }
        }
    }
    let ring = |fd| VringFd { index: 255, fd };
    let parse = |word: u64, fds| Request::parse(Code::SetVringCall, &word.to_ne_bytes(), fds);
    assert_eq!(
        parse(255, vec![7]),
        Ok(Request::SetVringCall(ring(Some(7))))
    );
    assert_eq!(parse(0x1ff, vec![]), Ok(Request::SetVringCall(ring(None))));
}

#[test]
fn m2_memory_table_has_as_many_regions_as_it_says_and_a_descriptor_for_each() {
    let body = |count: u32, regions: u64| {
        let mut body = [count, 0].map(u32::to_ne_bytes).concat();
        for word in 0..4 * regions {
            body.extend(word.to_ne_bytes());
        }
        body
    };
    for count in [0u32, 1, 2, 7, 8, 9, 128, u32::MAX] {
        for regions in 0..10 {
            for fds in 0..10u64 {
                let parsed = Request::parse(
                    Code::SetMemTable,
                    &body(count, regions),
                    (0..fds).collect::<Vec<_>>(),
                );
                let good = count <= 8 && u64::from(count) == regions && fds == regions;
                assert_eq!(parsed.is_ok(), good, "{count} {regions} {fds}");
                let Ok(Request::SetMemTable(table)) = parsed else {
                    continue;
                };
                for (number, (region, fd)) in (0u64..).zip(table) {
                    let expected = Region {
                        guest_addr: 4 * number,
                        size: 4 * number + 1,
                        frontend_addr: 4 * number + 2,
                        mmap_offset: 4 * number + 3,
                    };
                    assert_eq!((region, fd), (expected, number));
                }
            }
        }
    }
}

#[test]
fn c12_configuration_message_is_as_long_as_it_says() {
    for code in [Code::GetConfig, Code::SetConfig] {
        for said in [0u32, 1, 60, 255, 256, 257, u32::MAX] {
            for len in [0usize, 1, 59, 60, 61, 255, 256, 257] {
                let mut body = [5, said, 1].map(u32::to_ne_bytes).concat();
                body.extend(vec![9; len]);
                let parsed = Request::<()>::parse(code, &body, vec![]);
                let good = usize::try_from(said) == Ok(len) && len <= 256;
                assert_eq!(parsed.is_ok(), good, "{code:?} {said} {len}");
            }
        }
    }
}

proptest! {
    #[test]
    fn numbers_arrive_where_they_belong(a: u32, b: u32, c: u64, d: u64, e: u64, f: u64) {
        let words = [a, b].map(u32::to_ne_bytes).concat();
        let longs = [c, d, e, f].map(u64::to_ne_bytes).concat();
        let both = [&words[..], &longs].concat();
        let word = VringWord { index: a, num: b };
        let region = Region { guest_addr: c, size: d, frontend_addr: e, mmap_offset: f };
        let parse = |code, bytes: &[u8], fds: &[u8]| Request::parse(code, bytes, fds.to_vec());
        prop_assert_eq!(parse(Code::SetVringNum, &words, &[]), Ok(Request::SetVringNum(word)));
        prop_assert_eq!(parse(Code::SetVringBase, &words, &[]), Ok(Request::SetVringBase(word)));
        prop_assert_eq!(parse(Code::SetVringEnable, &words, &[]), Ok(Request::SetVringEnable(word)));
        prop_assert_eq!(parse(Code::GetVringBase, &words, &[]), Ok(Request::GetVringBase(a)));
        prop_assert_eq!(parse(Code::SetVringAddr, &both, &[]), Ok(Request::SetVringAddr(VringAddress {
            index: a, flags: b, descriptor: c, used: d, available: e,
        })));
        prop_assert_eq!(parse(Code::AddMemReg, &both, &[3]), Ok(Request::AddMemReg(region, 3)));
        prop_assert_eq!(parse(Code::RemMemReg, &both, &[3, 4]), Ok(Request::RemMemReg(region)));
        let area = LogArea { size: c, offset: d };
        prop_assert_eq!(parse(Code::SetLogBase, &longs[..16], &[3]), Ok(Request::SetLogBase(area, 3)));
        let number = &longs[..8];
        prop_assert_eq!(parse(Code::SetFeatures, number, &[]), Ok(Request::SetFeatures(c)));
        prop_assert_eq!(parse(Code::SetStatus, number, &[]), Ok(Request::SetStatus(c)));
    }

    #[test]
    fn nothing_is_too_odd_to_be_parsed(number in 0u32..50, bytes: Vec<u8>, fds in 0usize..12) {
        if let Some(code) = Code::of(number) {
            let _ = Request::parse(code, &bytes, vec![(); fds]);
        }
    }

    #[test]
    fn inflight_areas_come_with_and_without_padding(size: u64, offset: u64, num_queues: u16, queue_size: u16, junk: u32) {
        let mut body = [size, offset].map(u64::to_ne_bytes).concat();
        body.extend([num_queues, queue_size].map(u16::to_ne_bytes).concat());
        let area = InflightArea { size, offset, num_queues, queue_size };
        for padded in [false, true] {
            if padded {
                body.extend(junk.to_ne_bytes());
            }
            let set = Request::parse(Code::SetInflightFd, &body, vec![5]);
            prop_assert_eq!(set, Ok(Request::SetInflightFd(area, 5)));
            let get = Request::<u8>::parse(Code::GetInflightFd, &body, vec![]);
            prop_assert_eq!(get, Ok(Request::GetInflightFd { num_queues, queue_size, padded }));
        }
    }
}
