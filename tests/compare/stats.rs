//! Metrics as observations: which fields there are, those of them that do not depend on the moment with their values. Pure.

use containerd_shim_protos::protobuf::{
    Message, MessageDyn, reflect::ReflectFieldRef, reflect::ReflectValueRef,
};
use containerd_shim_protos::{cgroups::metrics as v1, cgroups_v2::metrics as v2};

/// Fields whose values are settings, not measurements.
const EXACT: [&str; 9] = [
    "pids.limit",
    "memory.usage.limit",
    "memory.usage_limit",
    "memory.swap.limit",
    "memory.swap_limit",
    "memory.kernel.limit",
    "memory.kernel_tcp.limit",
    "memory.hierarchical_memory_limit",
    "memory_oom_control.oom_kill_disable",
];

/// Fields that are zero or not by chance: what the kernel has counted so far.
const CHANCE: [&str; 17] = [
    // v2's list is empty until something came from a disk and not from the page cache
    "io.usage",
    "memory.dirty",
    "memory.writeback",
    "cpu.usage.user",
    "cpu.usage.kernel",
    "cpu.usage.per_cpu",
    "cpu.user_usec",
    "cpu.system_usec",
    "cpu.throttling",
    "memory.total_pg",
    "memory.pg",
    "memory.total_",
    "memory.cache",
    "memory.mapped_file",
    "memory.active",
    "memory.inactive",
    "memory.kernel",
];

/// Metrics by their type and content.
pub fn shown(kind: &str, value: &[u8]) -> String {
    let parsed: Result<Box<dyn MessageDyn>, _> = match kind.rsplit('/').next().unwrap_or_default() {
        "io.containerd.cgroups.v1.Metrics" => v1::Metrics::parse_from_bytes(value).map(|m| Box::new(m) as _),
        "io.containerd.cgroups.v2.Metrics" => v2::Metrics::parse_from_bytes(value).map(|m| Box::new(m) as _),
        _ => return format!("{kind} of {} bytes", value.len()),
    };
    match parsed {
        Ok(metrics) => {
            let mut fields = Vec::new();
            walk(&*metrics, "", &mut fields);
            format!("{kind} {}", fields.join(" "))
        }
        Err(e) => format!("{kind}: {e}"),
    }
}

/// The names of all fields that are set, in the order of the message.
fn walk(message: &dyn MessageDyn, prefix: &str, fields: &mut Vec<String>) {
    for field in message.descriptor_dyn().fields() {
        let name = format!("{prefix}{}", field.name());
        match field.get_reflect(message) {
            ReflectFieldRef::Optional(value) => match value.value() {
                Some(ReflectValueRef::Message(inner)) => {
                    fields.push(format!("{name}{{}}"));
                    walk(&*inner, &format!("{name}."), fields);
                }
                Some(value) => leaf(&name, &value.to_string(), fields),
                None => {}
            },
            ReflectFieldRef::Repeated(list) if !list.is_empty() && !CHANCE.contains(&name.as_str()) => {
                // how many entries there are is up to the machine's disks and processors
                fields.push(format!("{name}[]"));
                if let ReflectValueRef::Message(inner) = list.get(0) {
                    walk(&*inner, &format!("{name}[0]."), fields);
                }
            }
            _ => {}
        }
    }
}

fn leaf(name: &str, value: &str, fields: &mut Vec<String>) {
    let zero = matches!(value, "0" | "" | "\"\"" | "false" | "0.0");
    if EXACT.contains(&name) {
        fields.push(format!("{name}={value}"));
    } else if !zero && !CHANCE.iter().any(|c| name.starts_with(c)) && !name.contains('[') {
        fields.push(name.to_owned());
    }
}
