//! The machine the figures are from.

use std::process::Command;

use serde_json::{Value, json};

fn first_line(program: &str, args: &[&str]) -> String {
    let output = Command::new(program).args(args).output();
    let text = output.map(|o| String::from_utf8_lossy(&o.stdout).into_owned()).unwrap_or_default();
    text.lines().next().unwrap_or_default().trim().to_owned()
}

fn field(file: &str, name: &str) -> String {
    let text = std::fs::read_to_string(file).unwrap_or_default();
    let value = text.lines().find_map(|l| l.strip_prefix(name)?.trim_start().strip_prefix([':', '=']));
    value.unwrap_or_default().trim().trim_matches('"').to_owned()
}

/// Whether this kernel tells which pages were written since (CONFIG_MEM_SOFT_DIRTY, bit 55 of
/// https://docs.kernel.org/admin-guide/mm/pagemap.html): tried on a page of our own.
pub fn soft_dirty() -> bool {
    use std::os::unix::fs::FileExt;
    let page = Box::new([1u8; 8192]);
    let probe = || {
        std::fs::write("/proc/self/clear_refs", "4")?;
        // SAFETY: a byte in the middle of our own allocation.
        unsafe { std::ptr::write_volatile(page.as_ptr().add(4096).cast_mut(), 2) };
        let mut entry = [0; 8];
        let at = (page.as_ptr() as u64 + 4096) / 4096 * 8;
        std::fs::File::open("/proc/self/pagemap")?.read_exact_at(&mut entry, at)?;
        std::io::Result::Ok(u64::from_le_bytes(entry) & 1 << 55 != 0)
    };
    probe().unwrap_or(false)
}

/// `programs`: first lines of the versions of what runs in the nodes.
pub fn describe(programs: &[(&str, String)]) -> Value {
    let memory: u64 = field("/proc/meminfo", "MemTotal").trim_end_matches(" kB").parse().unwrap_or(0);
    let cgroups =
        if std::path::Path::new("/sys/fs/cgroup/cgroup.controllers").exists() { "v2" } else { "v1" };
    let programs: serde_json::Map<String, Value> =
        programs.iter().map(|(name, version)| ((*name).to_owned(), json!(version))).collect();
    json!({
        "date": first_line("date", &["-u", "+%Y-%m-%d %H:%M UTC"]),
        "cpu": field("/proc/cpuinfo", "model name"),
        "cores": std::thread::available_parallelism().map_or(0, usize::from),
        "memory_gib": (memory as f64 / 1048576.0 * 10.0).round() / 10.0,
        "kernel": first_line("uname", &["-r"]),
        "system": field("/etc/os-release", "PRETTY_NAME"),
        "cgroups": cgroups, "soft_dirty": soft_dirty(), "load": load(), "programs": programs,
    })
}

/// The load average of the last minute: figures from a busy machine say little.
pub fn load() -> f64 {
    let text = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split_whitespace().next().and_then(|l| l.parse().ok()).unwrap_or(0.0)
}
