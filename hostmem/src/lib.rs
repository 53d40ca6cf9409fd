//! Immutable guest memory map: guest-physical and front-end addresses to host memory
