//! Copies in and out of a chain's buffers, against a walk over their bytes.

use vring::Chain;

use crate::naive_memory::NaiveMemory;
use crate::naive_walk::Buffer;
use crate::ring_input::Memory;

/// Copies out of the chain that `buffers` are the buffers of.
pub(crate) fn copy_from_readable(
    chain: &Chain,
    buffers: &[Buffer],
    memory: &Memory,
    naive: &NaiveMemory,
    (offset, count): (u32, u16),
) {
    let mut expected = Vec::new();
    let mut hole = false;
    for address in bytes_of(buffers, false, offset).take(usize::from(count)) {
        match naive.byte(address) {
            Some(byte) => expected.push(byte),
            None => {
                hole = true;
                break;
            }
        }
    }
    let mut found = vec![0; usize::from(count)];
    match chain.copy_from_readable(memory, u64::from(offset), &mut found) {
        Ok(copied) => assert_eq!((copied, hole), (expected.len(), false)),
        Err(error) => assert_eq!((error.completed, hole), (expected.len(), true)),
    }
    assert_eq!(found[..expected.len()], expected);
}

/// Copies into it, and into `naive`. Returns the addresses written, in order.
pub(crate) fn copy_to_writable(
    chain: &Chain,
    buffers: &[Buffer],
    memory: &Memory,
    naive: &mut NaiveMemory,
    (offset, count): (u32, u16),
) -> Vec<u64> {
    let data: Vec<u8> = (1..=u8::MAX).cycle().take(usize::from(count)).collect();
    let mut written = Vec::new();
    let mut hole = false;
    for (address, byte) in bytes_of(buffers, true, offset).zip(&data) {
        if naive.byte(address).is_none() {
            hole = true;
            break;
        }
        naive.write(address, &[*byte]);
        written.push(address);
    }
    match chain.copy_to_writable(memory, u64::from(offset), &data) {
        Ok(copied) => assert_eq!((copied, hole), (written.len(), false)),
        Err(error) => assert_eq!((error.completed, hole), (written.len(), true)),
    }
    written
}

/// The addresses of the bytes of one direction, from `offset` on.
fn bytes_of(buffers: &[Buffer], writable: bool, offset: u32) -> impl Iterator<Item = u64> {
    let mut skip = offset;
    buffers
        .iter()
        .filter(move |buffer| buffer.writable == writable)
        .flat_map(move |buffer| {
            let from = skip.min(buffer.len);
            skip -= from;
            (u64::from(from)..u64::from(buffer.len)).map(|byte| buffer.addr + byte)
        })
}
