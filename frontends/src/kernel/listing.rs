//! `torusblk nbd --list` and `--detach`.

use super::control::Control;
use super::memo::Memo;
use super::{BACKEND_PREFIX, KernelError, sysfs};
use crate::admin::Report;
use serde_json::json;
use std::path::Path;
use torus_schema::size;

/// Every attached device, ours or not.
pub fn list() -> Result<Report, KernelError> {
    let mut control = Control::open()?;
    let mut report = Report { header: vec!["DEVICE", "SIZE", "VOLUME", "SERVED BY"], ..Report::default() };
    let mut documents = Vec::new();
    let mut attached: Vec<u32> = control.devices()?.into_iter().map(|device| device.index).collect();
    attached.sort_unstable();
    for index in attached.into_iter().filter(|index| sysfs::is_attached(*index)) {
        let device = sysfs::device_path(index).display().to_string();
        let backend = sysfs::backend(index).unwrap_or_default();
        let uuid = backend.strip_prefix(BACKEND_PREFIX);
        // A note of an earlier device of this number says nothing of this one.
        let memo = Memo::read(index).filter(|memo| uuid == Some(&*memo.volume.to_string()));
        let volume = memo.as_ref().map(|memo| memo.name.clone());
        let served = memo.as_ref().filter(|memo| memo.is_served()).map(|memo| memo.pid);
        let size_bytes = sysfs::size_bytes(index).unwrap_or(0);
        let whose = match (&volume, uuid) {
            (Some(name), _) => name.clone(),
            (None, Some(uuid)) => uuid.to_string(),
            (None, None) => "(not of torusblk)".to_string(),
        };
        let by = match (served, uuid) {
            (Some(pid), _) => format!("pid {pid}"),
            (None, Some(_)) => "nobody: its requests wait".to_string(),
            (None, None) => String::new(),
        };
        report.rows.push(vec![device.clone(), size::format(size_bytes), whose, by]);
        documents.push(json!({
            "device": device, "size_bytes": size_bytes.to_string(), "volume": volume, "uuid": uuid, "pid": served,
            "read_only": sysfs::is_read_only(index),
        }));
    }
    Ok(Report { json: documents.into(), ..report })
}

/// Flushed, unless forced, and gone when it returns. Whoever serves it notices and ends.
pub fn detach(device: &Path, force: bool) -> Result<Report, KernelError> {
    let index = sysfs::index_of(device)?;
    let mut control = Control::open()?;
    if !sysfs::is_attached(index) {
        return Err(KernelError::NotAttached { device: device.to_path_buf() });
    }
    let backend = sysfs::backend(index).unwrap_or_default();
    if !backend.starts_with(BACKEND_PREFIX) {
        return Err(KernelError::NotOurs { device: device.to_path_buf(), backend });
    }
    if force {
        control.disconnect(index)?;
    } else {
        // Held until it is detached, so that nobody begins to use it in between.
        let alone = sysfs::open_alone(index)?;
        let failed = |because| KernelError::Io { what: format!("flushing {}", device.display()), because };
        alone.sync_all().map_err(failed)?;
        control.disconnect(index)?;
    }
    super::memo::remove(index);
    Ok(Report::said(format!("{} detached", device.display()), json!({"device": device})))
}
