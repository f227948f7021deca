//! Lines of `key = value` in sections, as pip and npm have them. Pure.

/// Section, key and value of each entry. Keys and sections are in lower case, `_` in keys is `-`; indented lines continue a value.
pub(super) fn entries(text: &str) -> Vec<(String, String, String)> {
    let mut entries: Vec<(String, String, String)> = Vec::new();
    let mut section = String::new();
    for line in text.lines() {
        let is_indented = line.starts_with([' ', '\t']);
        let line = line.trim();
        if line.is_empty() || line.starts_with(['#', ';']) {
            continue;
        }
        if let Some(name) = line.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).filter(|_| !is_indented) {
            section = name.trim().to_lowercase();
        } else if let (true, Some(last)) = (is_indented, entries.last_mut()) {
            last.2.push('\n');
            last.2.push_str(line);
        } else if let Some((key, value)) = line.split_once(['=', ':']) {
            entries.push((section.clone(), normal(key), value.trim().to_owned()));
        }
    }
    entries
}

/// A key in one spelling.
fn normal(key: &str) -> String {
    key.trim().to_lowercase().replace('_', "-")
}
