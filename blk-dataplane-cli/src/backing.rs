//! Opens what a device stores its content in, and says what is unusual about it.

use blk_dataplane::{Backing, Image, ImageOptions};

use crate::device_arguments::DeviceArguments;
use crate::failure::image_failure;
use crate::standard_error::say;
use crate::{Failure, image_notes};

/// Opens the image, or creates it, or makes a null device.
pub(crate) fn open(arguments: &DeviceArguments) -> Result<Backing, Failure> {
    let Some(path) = &arguments.blk_file else {
        // One of the two is there: see `DeviceArguments::check`.
        let size = arguments.null.unwrap_or_default();
        return Ok(if arguments.read_zeroes {
            Backing::null_zeroes(size)
        } else {
            Backing::null(size)
        });
    };
    let mut wanted = arguments.create;
    if let Some(size) = arguments.create
        && Image::create_if_missing(path, size).map_err(|error| image_failure(&error))?
    {
        say(&format!(
            "blk-dataplane: created {} ({size} bytes, sparse)\n",
            path.display()
        ));
        wanted = None;
    }
    let options = ImageOptions {
        read_only: arguments.read_only,
        force_share: arguments.force_share,
        incoming: arguments.incoming,
        ..ImageOptions::default()
    };
    let image = Image::open(path, &options).map_err(|error| image_failure(&error))?;
    for note in image_notes::about(&image, wanted) {
        say(&format!("blk-dataplane: {}: {note}\n", path.display()));
    }
    Ok(Backing::Image(image))
}
