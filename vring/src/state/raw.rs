//! The state as it is serialised: numbers, checked on the way in.

use serde::{Deserialize, Serialize};
use vm_memory::GuestAddress;

use super::QueueState;
use crate::base::{PackedPosition, RingBase};
use crate::config::{ConfigError, QueueConfig, QueueSize, RingAddresses, RingFeatures};

#[derive(Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub(super) struct State {
    size: u16,
    descriptor_area: u64,
    driver_area: u64,
    device_area: u64,
    indirect_desc: bool,
    event_idx: bool,
    in_order: bool,
    /// With the format: split or packed.
    position: Position,
}

#[derive(Deserialize, Serialize)]
#[serde(deny_unknown_fields, rename_all = "snake_case")]
enum Position {
    /// The used index is missing only in a state that was not saved but made up.
    Split {
        next_avail: u16,
        used_idx: Option<u16>,
    },
    /// As in vhost-user's ring state: 15 bits of index, and the wrap counter.
    Packed { avail: u16, used: u16 },
}

impl From<QueueState> for State {
    fn from(state: QueueState) -> Self {
        let QueueState { config, used_idx } = state;
        Self {
            size: config.size.get(),
            descriptor_area: config.addresses.descriptor_area.0,
            driver_area: config.addresses.driver_area.0,
            device_area: config.addresses.device_area.0,
            indirect_desc: config.features.indirect_desc,
            event_idx: config.features.event_idx,
            in_order: config.features.in_order,
            position: match config.base {
                RingBase::Packed { avail, used } => Position::Packed {
                    avail: avail.to_bits(),
                    used: used.to_bits(),
                },
                RingBase::Split { next_avail } => Position::Split {
                    next_avail,
                    used_idx,
                },
            },
        }
    }
}

impl TryFrom<State> for QueueState {
    type Error = ConfigError;

    fn try_from(state: State) -> Result<Self, ConfigError> {
        let (base, used_idx) = match state.position {
            Position::Packed { avail, used } => {
                let avail = PackedPosition::from_bits(avail);
                let used = PackedPosition::from_bits(used);
                (RingBase::Packed { avail, used }, None)
            }
            Position::Split {
                next_avail,
                used_idx,
            } => (RingBase::Split { next_avail }, used_idx),
        };
        Ok(Self {
            config: QueueConfig {
                size: QueueSize::try_from(state.size)?,
                addresses: RingAddresses {
                    descriptor_area: GuestAddress(state.descriptor_area),
                    driver_area: GuestAddress(state.driver_area),
                    device_area: GuestAddress(state.device_area),
                },
                features: RingFeatures {
                    indirect_desc: state.indirect_desc,
                    event_idx: state.event_idx,
                    in_order: state.in_order,
                    packed: matches!(base, RingBase::Packed { .. }),
                },
                base,
            },
            used_idx,
        })
    }
}
