//! virtio-blk data plane: device, data thread, and (feature vhost-user) the protocol server
