//! How each system and each process looks: colour by whose it is and how many replicas, line and marker by how it is
//! reached, so that nothing is told by colour alone.

use super::svg::{Marker, Svg, escape};
use crate::compare::report::Report;
use crate::compare::stand::{Described, RAW, Transport};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Look {
    /// Of style.css.
    pub class: &'static str,
    pub dash: &'static str,
    pub marker: Marker,
}

pub fn of_system(system: &Described) -> Look {
    let (class, own) = match (system.replicas, system.name.as_str()) {
        (None, RAW) => ("c-raw", Marker::Square),
        (None, name) if name.starts_with("Ceph") => ("c-ceph", Marker::Diamond),
        (None, name) if name.starts_with("qemu") => ("c-qemu", Marker::Triangle),
        (None, _) => ("c-kit", Marker::Diamond),
        (Some(1), name) if name.starts_with("torus-engine") => ("c-inside", Marker::Square),
        (Some(1), _) => ("c-one", Marker::Triangle),
        (Some(_), _) => ("c-three", Marker::Circle),
    };
    match system.transport {
        Transport::File | Transport::Unix => Look { class, dash: "solid", marker: own },
        Transport::Tcp => Look { class, dash: "dashed", marker: own },
        Transport::Library => Look { class, dash: "dotted", marker: Marker::Diamond },
    }
}

/// Of a process: its class, and what it is.
pub fn of_process(name: &str) -> (&'static str, &'static str) {
    match name {
        name if ["metadata", "ceph-mon", "ceph-mgr"].iter().any(|begin| name.starts_with(begin)) => {
            ("p-metadata", "metadata")
        }
        name if ["node", "torus-engine", "ceph-osd"].iter().any(|begin| name.starts_with(begin)) => {
            ("p-node", "storage node")
        }
        _ => ("p-server", "NBD server"),
    }
}

pub const CLIENT_CLASS: &str = "p-client";
/// In the order in which they are stacked.
pub const ROLES: [(&str, &str); 4] = [
    (CLIENT_CLASS, "client: fio, or our library's process"),
    ("p-metadata", "metadata; Ceph's monitor and manager"),
    ("p-node", "storage nodes, Ceph's OSDs, one piece each"),
    ("p-server", "NBD server: torusblk, qemu-nbd, nbdkit"),
];

const SWATCH_WIDTH: f64 = 34.0;
const SWATCH_HEIGHT: f64 = 14.0;

/// Of all systems.
pub fn legend(report: &Report) -> String {
    let entry = |system: &Described| {
        let look = of_system(system);
        let mut svg = Svg::new(SWATCH_WIDTH, SWATCH_HEIGHT, "");
        let middle = SWATCH_HEIGHT / 2.0;
        svg.line(&format!("series {} {}", look.class, look.dash), (2.0, middle), (SWATCH_WIDTH - 2.0, middle));
        svg.marker(&format!("mark {}", look.class), look.marker, (SWATCH_WIDTH / 2.0, middle), &system.name);
        format!("<li>{}{}</li>", svg.end(), escape(&system.name))
    };
    let entries: String = report.systems.iter().map(entry).collect();
    format!("<ul class=\"legend\">{entries}</ul>\n")
}

/// Of the pieces of stacked bars.
pub fn role_legend() -> String {
    let entry = |(class, name): &(&str, &str)| {
        let mut svg = Svg::new(SWATCH_HEIGHT, SWATCH_HEIGHT, "");
        svg.rect(class, (1.0, 1.0), (SWATCH_HEIGHT - 2.0, SWATCH_HEIGHT - 2.0), name);
        format!("<li>{}{}</li>", svg.end(), escape(name))
    };
    format!("<ul class=\"legend\">{}</ul>\n", ROLES.iter().map(entry).collect::<String>())
}
