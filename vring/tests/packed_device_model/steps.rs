//! What driver and device do, at random.

use proptest::prelude::*;
use vring::PackedPosition;

use crate::model::{BUFFERS, END, INDIRECT, RING, SEAM, TABLES, WRITE};

/// A buffer as the driver describes it; flags but those of the chain.
#[derive(Clone, Debug)]
pub(crate) struct Buffer {
    pub(crate) address: u64,
    pub(crate) len: u32,
    pub(crate) flags: u16,
}

/// One step of either side.
#[derive(Clone, Debug)]
pub(crate) enum Step {
    Add {
        buffers: Vec<Buffer>,
        table: Option<u64>,
        id: Option<u16>,
        endless: bool,
        heedless: bool,
    },
    Poke {
        at: usize,
        value: u16,
    },
    DriverEvent {
        desc: u16,
        flags: u16,
    },
    Pop,
    Unpop {
        which: usize,
    },
    Push {
        which: usize,
        len: Option<u32>,
    },
    Publish,
    ShouldNotify,
    Enable,
    Disable,
    Restart,
}

pub(crate) fn buffer() -> impl Strategy<Value = Buffer> {
    let len = prop_oneof![
        12 => 1u32..64, 1 => Just(0u32), 1 => Just(u32::MAX), 1 => Just(1 << 31)
    ];
    let address = prop_oneof![12 => BUFFERS..2 * BUFFERS, 1 => Just(u64::MAX - 20)];
    // Writable mostly, so that most chains are in order; sometimes flags that are not looked at.
    let flags =
        prop_oneof![8 => Just(WRITE), 4 => Just(0), 1 => Just(WRITE | 0x0f78), 1 => Just(INDIRECT)];
    (address, len, flags).prop_map(|(address, len, flags)| Buffer {
        address,
        len,
        flags,
    })
}

pub(crate) fn steps() -> impl Strategy<Value = Vec<Step>> {
    let table = prop_oneof![
        6 => Just(None),
        3 => (0u64..16).prop_map(|i| Some(TABLES + 0x80 * i)),
        1 => (0u64..16).prop_map(|i| Some(TABLES + 0x80 * i + 3)),
        1 => (1u64..120).prop_map(|i| Some(SEAM - i)),
        1 => Just(Some(u64::try_from(END).unwrap() - 40)),
    ];
    let id =
        prop_oneof![30 => Just(None), 1 => (0u16..8).prop_map(Some), 2 => Just(Some(u16::MAX))];
    let add = (
        proptest::collection::vec(buffer(), 1..5),
        table,
        id,
        prop_oneof![60 => Just(false), 1 => Just(true)],
        prop_oneof![60 => Just(false), 1 => Just(true)],
    )
        .prop_map(|(buffers, table, id, endless, heedless)| Step::Add {
            buffers,
            table,
            id,
            endless,
            heedless,
        });
    let poke = (0usize..0x80, any::<u16>()).prop_map(|(half, value)| Step::Poke {
        at: RING + 2 * half,
        value,
    });
    let flags = prop_oneof![1 => 0u16..4, 3 => Just(2), 1 => any::<u16>()];
    let desc = prop_oneof![
        (0u16..17, any::<bool>())
            .prop_map(|(index, wrap)| PackedPosition { index, wrap }.to_bits()),
        any::<u16>(),
    ];
    let event = (desc, flags).prop_map(|(desc, flags)| Step::DriverEvent { desc, flags });
    let len = prop_oneof![3 => Just(None), 1 => (0u32..70).prop_map(Some)];
    let step = prop_oneof![
        40 => add,
        1 => poke,
        6 => event,
        50 => Just(Step::Pop),
        8 => (0usize..3).prop_map(|which| Step::Unpop { which }),
        50 => (0usize..8, len).prop_map(|(which, len)| Step::Push { which, len }),
        25 => Just(Step::Publish),
        15 => Just(Step::ShouldNotify),
        8 => Just(Step::Enable),
        8 => Just(Step::Disable),
        4 => Just(Step::Restart),
    ];
    proptest::collection::vec(step, 1..120)
}
