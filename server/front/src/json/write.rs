//! Writes numbers as JSON.

/// Numbers as the entries of a JSON list, without its brackets. Values that JSON does not have are strings.
pub fn numbers(values: &[f64]) -> String {
    let mut out = Vec::with_capacity(values.len() * 12);
    for value in values {
        if !out.is_empty() {
            out.extend_from_slice(b", ");
        }
        let name = match value {
            value if value.is_nan() => "NaN",
            value if *value == f64::INFINITY => "Infinity",
            value if *value == f64::NEG_INFINITY => "-Infinity",
            _ => "",
        };
        // a writer of memory does not fail
        let _ = if name.is_empty() {
            serde_json::to_writer(&mut out, value)
        } else {
            serde_json::to_writer(&mut out, name)
        };
    }
    String::from_utf8(out).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_short_and_values_that_are_none_are_strings() {
        let values = [0.1, -2.0, 1e300, f64::NAN, f64::INFINITY, f64::NEG_INFINITY, -0.0];
        assert_eq!(numbers(&values), r#"0.1, -2.0, 1e300, "NaN", "Infinity", "-Infinity", -0.0"#);
        assert_eq!(numbers(&[]), "");
    }
}
