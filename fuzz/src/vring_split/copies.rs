//! Copies in and out of a chain's buffers, against a walk over their bytes.

use super::Rig;
use crate::naive_walk::Buffer;

impl Rig<'_> {
    pub(super) fn copy_from_readable(&mut self, offset: u32, count: u16) {
        let Some(buffers) = &self.buffers else { return };
        let mut expected = Vec::new();
        let mut hole = false;
        for address in bytes_of(buffers, false, offset).take(usize::from(count)) {
            match self.naive.byte(address) {
                Some(byte) => expected.push(byte),
                None => {
                    hole = true;
                    break;
                }
            }
        }
        let mut found = vec![0; usize::from(count)];
        let result = self
            .chain
            .copy_from_readable(&*self.memory, u64::from(offset), &mut found);
        match result {
            Ok(copied) => assert_eq!((copied, hole), (expected.len(), false)),
            Err(error) => assert_eq!((error.completed, hole), (expected.len(), true)),
        }
        assert_eq!(found[..expected.len()], expected);
    }

    pub(super) fn copy_to_writable(&mut self, offset: u32, count: u16) {
        let Some(buffers) = &self.buffers else { return };
        let data: Vec<u8> = (1..=u8::MAX).cycle().take(usize::from(count)).collect();
        let mut written = 0;
        let mut hole = false;
        for (address, byte) in bytes_of(buffers, true, offset).zip(&data) {
            if self.naive.byte(address).is_none() {
                hole = true;
                break;
            }
            self.naive.write(address, &[*byte]);
            written += 1;
        }
        if (1..=written)
            .zip(bytes_of(buffers, true, offset))
            .any(|(_, at)| self.in_use(at, 1))
        {
            // The guest has harmed itself.
            self.clean = false;
        }
        match self
            .chain
            .copy_to_writable(&*self.memory, u64::from(offset), &data)
        {
            Ok(copied) => assert_eq!((copied, hole), (written, false)),
            Err(error) => assert_eq!((error.completed, hole), (written, true)),
        }
    }
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
