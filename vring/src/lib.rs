//! Device side of a virtio virtqueue, bounded and total over any ring contents; feature driver: the guest side
