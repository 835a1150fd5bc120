//! Colours and letters of the picture, for light and dark screens. Plain classes: no variables, which some viewers lack.

/// Width of the picture.
pub const WIDTH: f64 = 1200.0;
/// Where the lanes begin: what is left of it are their names.
pub const LEFT: f64 = 160.0;
/// Where they end.
pub const RIGHT: f64 = WIDTH - 28.0;
/// Height of a bar.
pub const BAR: f64 = 22.0;
/// About the width of a letter, per height of the type.
const LETTER: f64 = 0.56;
/// Height of small type, in bars and on axes.
pub const SMALL: f64 = 11.0;

/// About the width of a small text.
pub fn width(text: &str) -> f64 {
    text.chars().count() as f64 * SMALL * LETTER
}

/// The picture's style sheet.
pub const CSS: &str = "
text{font-family:system-ui,'Segoe UI',Helvetica,Arial,sans-serif;font-size:11px;fill:#1c2330}
.paper{fill:#ffffff}.title{font-size:19px;font-weight:600}.head{font-size:13px;font-weight:600}
.dim{fill:#5d6778}.in{fill:#ffffff}.grid{stroke:#d8dde6;stroke-width:1}.lane{fill:#f3f5f9}
.source{fill:#2f6fd0}.source.odd{fill:#4a82d8}.destination{fill:#a95808}.destination.odd{fill:#c27020}
.copy{fill:#66738c}.copy.odd{fill:#7f8ca4}.still{fill:#d0312d;fill-opacity:.16}.edge{stroke:#d0312d;stroke-width:1}
.zoom{fill:#d0312d;fill-opacity:.06}.stilltext{fill:#b3211d;font-weight:600}
.sent{fill:#2f6fd0;fill-opacity:.22}.dirty{fill:none;stroke:#7b3fc4;stroke-width:2}.dot{fill:#7b3fc4}.dirtytext{fill:#7b3fc4}
.sourcetext{fill:#2f6fd0}
.left{fill:none;stroke:#2f6fd0;stroke-width:2;stroke-dasharray:5 3}
.faults{fill:none;stroke:#b8620c;stroke-width:2}.faultstext{fill:#b8620c}.lost{fill:#b3211d;font-weight:600}
@media (prefers-color-scheme:dark){
text{fill:#e4e8ef}.paper{fill:#151a22}.dim{fill:#98a3b5}.in{fill:#0d1117}.grid{stroke:#303948}.lane{fill:#1c232e}
.source{fill:#6ea8ff}.source.odd{fill:#4f86d9}.destination{fill:#f0a04b}.destination.odd{fill:#cc8135}
.copy{fill:#8492aa}.copy.odd{fill:#66738a}.still{fill:#ff6b63;fill-opacity:.22}.edge{stroke:#ff6b63}.zoom{fill:#ff6b63;fill-opacity:.08}
.stilltext{fill:#ff8d86}.sent{fill:#6ea8ff;fill-opacity:.28}.dirty{stroke:#c79bff}.dot{fill:#c79bff}.dirtytext{fill:#c79bff}
.sourcetext{fill:#6ea8ff}.left{stroke:#6ea8ff}.faults{stroke:#f0a04b}.faultstext{fill:#f0a04b}.lost{fill:#ff8d86}
}
";

/// What a page adds to it.
pub const PAGE: &str = "
body{margin:24px;font:14px/1.5 system-ui,'Segoe UI',Helvetica,Arial,sans-serif;background:#ffffff;color:#1c2330}
svg{width:100%;max-width:1400px;height:auto;display:block}table{border-collapse:collapse;margin:0 0 28px}
h2{font-size:15px;margin:28px 0 8px}th,td{padding:2px 14px 2px 0;text-align:right;font-variant-numeric:tabular-nums}
th{font-weight:600;border-bottom:1px solid #d8dde6}td:first-child,th:first-child{text-align:left}
@media (prefers-color-scheme:dark){body{background:#151a22;color:#e4e8ef}th{border-color:#303948}}
";
